"""The run's model as files that transformers loads: those of model/ as they stand, with imports made relative.

A folder of transformers is flat, so model/attention/base.py becomes model_attention_base.py. Nothing else is changed,
so that there is no second implementation to keep in step.
"""

import ast
import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

TEMPLATES = "eval.export.templates"
ENTRY = f"{TEMPLATES}.modeling_t6"
CONFIGURATION = f"{TEMPLATES}.configuration_t6"
PACKAGES = {"configs", "model"}
LEFT_OUT = "model.cores.kernels.gpu"  # Triton's kernels, which only core.kernel=factors or triton on a GPU import
OPERATORS = '"t6::'  # the namespace of our operators in torch, of which a process may hold several versions


def flat(module: str) -> str:
    """Return the name that a module has in the folder."""
    return module.removeprefix(f"{TEMPLATES}.") if module.startswith(TEMPLATES) else module.replace(".", "_")


def file_of(module: str) -> Path | None:
    """Return the file of a module, None if there is no such module."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # its parent is no package
        return None
    return Path(spec.origin) if spec and spec.origin else None


def sources(classes: Iterable[type]) -> dict[str, str]:
    """Return the text of each file by name: modeling_t6.py, configuration_t6.py and all that the `classes` need."""
    chosen = {cls.__module__ for cls in classes}
    packages = PACKAGES | {module.partition(".")[0] for module in chosen}
    todo, texts = [ENTRY, *sorted(chosen)], {}
    while todo:
        module = todo.pop()
        if module not in texts and not module.startswith(LEFT_OUT):
            texts[module], found = relative(file_of(module).read_text(encoding="utf-8"), packages)
            todo += sorted(found)
    # transformers copies the files that the first one names, in lines of this form.
    named = sorted(flat(module) for module in texts if module != ENTRY)
    texts[ENTRY] += "\n# The files of this folder that are loaded\n"
    texts[ENTRY] += "".join(f"from .{name} import __name__ as _  # noqa: E402, F401, I001\n" for name in named)
    version = hashlib.sha256("".join(texts[module] for module in sorted(texts)).encode()).hexdigest()[:8]
    # A process may load several exports: transformers tells their code apart by the text of the configuration's file.
    texts[CONFIGURATION] += f'\nCODE_VERSION = "{version}"\n'
    own = OPERATORS.replace("t6", f"t6_{version}")
    return {f"{flat(module)}.py": text.replace(OPERATORS, own) for module, text in texts.items()}


def relative(text: str, packages: set[str]) -> tuple[str, set[str]]:
    """Return a module's text with imports from `packages` and the templates made relative, and what they import."""
    lines, found = text.splitlines(keepends=True), set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        if not (node.module.partition(".")[0] in packages or node.module.startswith(TEMPLATES)):
            continue
        names, rewritten = [], []
        for alias in node.names:
            module = f"{node.module}.{alias.name}"
            if file_of(module):
                found.add(module)
                rewritten.append(f"from . import {flat(module)} as {alias.asname or alias.name}")
            else:
                names.append(f"{alias.name} as {alias.asname}" if alias.asname else alias.name)
        if names:
            found.add(node.module)
            rewritten.append(f"from .{flat(node.module)} import {', '.join(names)}")
        indent = " " * node.col_offset
        lines[node.lineno - 1] = "".join(f"{indent}{line}\n" for line in rewritten)
        for number in range(node.lineno, node.end_lineno):
            lines[number] = ""
    return "".join(lines), found
