"""The XML that object stores answer with: lists and errors.

Refuses what such answers never have and what makes parsing dangerous: a document type, and with it entities,
and so many elements that they would take much memory. Object stores differ in the namespace of the elements,
so it means nothing here. Pure functions, for any thread.
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

from pbsfs.base.errors import DamageError

Element = ET.Element

MAX_PARTS = 64_000
"""Elements of a document at most, and attributes: with them, a document takes less than 48 MiB. A list of
1000 keys has some 11,000 elements. Each has a `<` and each attribute a `=`, which are counted first."""


def parse(body: bytes, name: str) -> Element:
    """The root element, which has this `name`. Raises DamageError if `body` is not such a document."""
    if b"<!DOCTYPE" in body or b"\0" in body:  # other encodings than UTF-8 have zeros
        raise DamageError("the answer is not the XML of an object store")
    if body.count(b"<") > MAX_PARTS or body.count(b"=") > MAX_PARTS:
        raise DamageError(f"the answer has more than {MAX_PARTS} elements or attributes")
    try:
        # What the document says about its encoding does not count, so nothing hides from the checks.
        root = ET.XML(body, ET.XMLParser(encoding="utf-8"))  # noqa: S314
    except (ET.ParseError, ValueError):
        raise DamageError("the answer is not XML") from None
    if local_name(root) != name:
        raise DamageError("the answer is another one than was asked for")
    return root


def local_name(element: Element) -> str:
    """The element's name without its namespace."""
    return element.tag.rpartition("}")[2]


def namespace(element: Element) -> str:
    """The namespace of the element's name, as `find` takes it before a name; empty if it has none."""
    return element.tag[: -len(local_name(element))]


def text_of(element: Element, name: str) -> str:
    """The text of the first child with this name; empty if there is none."""
    return next((child.text or "" for child in element if local_name(child) == name), "")
