"""The table of budgets has every mechanism and size, and the paper's numbers."""

import pytest

from configs.app import configured
from configs.errors import ConfigError
from eval.budgets import BudgetsConfig, main
from tests.model.helpers import PACKAGED


def budgets(*overrides: str) -> int:
    return main(configured(BudgetsConfig, list(overrides)))


def test_unknown_names_get_a_suggestion():
    for given, message in (("models=[t7]", "model=t7: .* did you mean t6"), ("sizes=[smal]", "size=smal: .* small")):
        with pytest.raises(ConfigError, match=message):
            budgets(given)


def test_what_cannot_be_matched_is_reported(capsys):
    assert budgets("models=[mla]", "sizes=[tiny]", "overrides=['size.d_model=64']") == 0
    assert "mla tiny: no match within 5%: params are 1." in capsys.readouterr().out


def test_the_table_has_every_mechanism_and_size(capsys):
    assert budgets("memory=24GiB", "detail=true") == 0
    out = capsys.readouterr().out
    rows = {
        tuple(line.split()[:2]): line.split() for line in out.splitlines() if line.startswith("  ") and line.strip()
    }
    rows.pop(("size", "model"))
    assert len(rows) == 5 * len(PACKAGED)
    assert rows["small", "t6"][2:5] == ["34", "124.3", "1.027"] and rows["xl", "mha"][2:5] == ["25", "1554.9", "1.000"]
    longest = int(rows["xl", "mha"][-1].replace(",", ""))
    used = 2 * 1_554_892_800 + longest * 307_200
    assert used <= 24 * 2**30 < used + 307_200


def test_the_tables_vocabulary(capsys):
    """GPT-2's unless another is given, as a group, by a key of it, or for every configuration."""
    one, own = ["models=[mha]", "sizes=[tiny]"], 11_427_840 - 50304 * 192  # what is not the embedding
    for given, rows in {
        "detail=true": 50304,
        "tokenizer=sentencepiece": 4096,
        "tokenizer.vocab_size=1000": 1024,
        "overrides=['tokenizer=sentencepiece']": 4096,
    }.items():
        assert budgets(*one, given) == 0
        assert f"{(own + rows * 192) / 1e6:.1f}" in capsys.readouterr().out.split(), given


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("memory=lots", "memory=lots: must be a size such as 24GiB"),
        ("match=heads", "match=heads: must be params, flops or kv_bytes"),
        ("seq_len=0", "seq_len=0: must be at least 2"),
    ],
)
def test_bad_settings(override, message):
    with pytest.raises(ConfigError, match=message):
        configured(BudgetsConfig, [override])
