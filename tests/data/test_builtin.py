import pytest

from data.sources.builtin import Tree, builtin_corpus, collect

MODULE = '''#!/usr/bin/env python
# -*- coding: utf-8 -*-
"""The first line of a docstring that is long enough to keep.

    An indented second paragraph, dedented when it is read,
      while its inner indentation stays.

short
"""
# This comment explains something at length, over more
# than a single line of source, and is one paragraph.
# -----------------------------------------------------------------

def function():
    """A paragraph that two modules share, word for word."""
    text = """
    # This line looks like a comment but is inside a string constant.
    """
    return text

add_docstr(function, r"""function(x) -> Tensor, documented by a call and not in its body""" + " {0}".format(1))
'''


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    (tmp_path / "pkg" / "a.py").write_text(MODULE)
    (tmp_path / "pkg" / "b.py").write_text(
        '"""A paragraph that two modules share, word for word."""\n'
        + "".join(
            f"def f{i}():\n    '''Paragraph {i} says what function number {i} is good for, in full sentences.'''\n"
            for i in range(6)
        )
    )
    (tmp_path / "pkg" / "broken.py").write_text("def (:\n")
    (tmp_path / "pkg" / "nul.py").write_bytes(b"x = '\0'\n")
    (tmp_path / "pkg" / "latin.py").write_bytes(b'"""A caf\xe9 without a coding line is no UTF-8 and is left out."""\n')
    (tmp_path / "pkg" / "test" / "c.py").write_text('"""' + "Tests are not part of the corpus. " * 9 + '"""\n')
    return Tree("made_up", tmp_path, comments=True)


def test_extraction(tree):
    a, b = collect([tree], workers=1)
    assert (a["name"], b["name"]) == ("made_up/pkg/a.py", "made_up/pkg/b.py")
    assert a["text"].split("\n\n") == [
        "The first line of a docstring that is long enough to keep.",
        "An indented second paragraph, dedented when it is read,\n  while its inner indentation stays.",
        "This comment explains something at length, over more\nthan a single line of source, and is one paragraph.\n"
        "-----------------------------------------------------------------",
        "A paragraph that two modules share, word for word.",
        "function(x) -> Tensor, documented by a call and not in its body",
    ]
    assert "two modules share" not in b["text"]  # the first one wins
    assert [part.split()[1] for part in b["text"].split("\n\n")] == list("012345")


def test_comments_only_where_wanted(tree):
    a, _ = collect([Tree(tree.name, tree.root)], workers=1)
    assert "This comment" not in a["text"] and "documented by a call" in a["text"]


def test_surrogates_do_not_survive(tmp_path):
    (tmp_path / "a.py").write_text('"""' + "A lone surrogate \\ud800 is no character that a file holds. " * 5 + '"""\n')
    [document] = collect([Tree("x", tmp_path)], workers=1)
    assert document["text"].startswith("A lone surrogate ? is")


def test_pydoc_topics(tmp_path):
    (tmp_path / "pydoc_data").mkdir()
    entries = {"assert": "Assert statements. " * 20, "x": "short"}
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {entries}")
    assert [document["name"] for document in collect([Tree("stdlib", tmp_path)], workers=1)] == ["pydoc/topics/assert"]


def test_the_same_for_every_number_of_workers(tree, start_method):
    assert collect([tree], workers=2) == collect([tree], workers=1)


def test_full_corpus():
    documents = builtin_corpus()
    names = [document["name"] for document in documents]
    assert names == sorted(set(names))
    assert {name.split("/")[0] for name in names} >= {"pydoc", "stdlib", "torch", "numpy"}
    assert sum(len(document["text"]) for document in documents) > 6_000_000
    paragraphs = [" ".join(part.split()) for document in documents for part in document["text"].split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
