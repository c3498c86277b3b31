"""Prose without a network: what the Python standard library says about itself.

One document a module: its docstrings in the order of the source, indentation and code gone. The long topics of
`help()`, the language reference among them, are a document each.

A document is split by its module's path, just as the module is by `stdlib_documents`: what one holds out the other holds
out too, so a model trained on either text has seen nothing of the held-out part of both.
"""

import ast
import inspect
from pathlib import Path

from nndecomp.tokens.documents import Document, stdlib_documents

TOPICS = "pydoc_data/topics.py"


def stdlib_docs_documents(root: Path | None = None) -> list[Document]:
    """Of every module that has docstrings, ordered by its path; `root` is the library's directory."""
    documents = []
    for module in stdlib_documents(root):
        assert isinstance(module.body, str), "a module is text"
        texts = topics(module.body) if module.key == TOPICS.encode() else [docstrings(module.body)]
        documents += [Document(text, module.key) for text in texts if text]
    assert documents, f"no docstrings of the standard library in {root}"
    return documents


def docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, a blank line between them."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    owners = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    owners.sort(key=lambda owner: 0 if isinstance(owner, ast.Module) else owner.lineno)
    return "\n\n".join(text for owner in owners if (text := ast.get_docstring(owner)))


def topics(source: str) -> list[str]:
    """The texts of `topics = {'name': 'text', ...}`, by name."""
    (table,) = (node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    found: dict[str, str] = ast.literal_eval(table)
    return [inspect.cleandoc(found[name]) for name in sorted(found)]
