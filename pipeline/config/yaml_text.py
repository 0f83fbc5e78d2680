"""YAML as people write it: `1e-5` is a number, as in YAML 1.2, and nothing is lost silently.

PyYAML keeps to YAML 1.1, where scientific notation needs a point and a sign (`1.0e-5`) and all else
is text; where a key stands twice, it takes the last one; sets and bytes are values to it.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_SCIENTIFIC = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")
_DEEPEST = 50
_LARGEST = 100_000


class _Loader(yaml.SafeLoader):
    """Reads scientific notation as numbers; refuses keys that stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML does, but for a key that stands twice. Raises ConstructorError."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _refused(f"the key {key.value!r} stands twice", key)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int:
        """As PyYAML does, but for more digits than Python reads. Raises ConstructorError."""
        try:
            return int(self.construct_yaml_int(node))
        except ValueError:
            raise _refused(f"a number of {len(node.value):,} digits", node) from None

    def construct_refused(self, node: yaml.Node) -> Any:
        """Raise ConstructorError for a kind of value that no setting has."""
        kind = node.tag.rpartition(":")[2]
        raise _refused(f"a value of the kind {kind!r}, which no setting has", node)


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
for _tag in ("set", "binary", "omap", "pairs"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_refused)


def read(text: str) -> Any:
    """The value that YAML text stands for. Raises yaml.YAMLError if it is not YAML, or goes more
    than 50 levels deep, as an alias does that holds itself."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, 0, [0])
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError(f"nested more than {_DEEPEST} levels deep") from None
    finally:
        loader.dispose()


def write(value: Any) -> str:
    """Plain values as YAML text, mappings in their own order; `read` gives them back."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def _check_size(node: yaml.Node, depth: int, count: list[int]) -> None:
    """Raise ConstructorError where values are nested too deeply, or are too many once aliases are
    what they stand for; `count` is how many were seen."""
    count[0] += 1
    if depth > _DEEPEST:
        raise _refused(f"nested more than {_DEEPEST} levels deep", node)
    if count[0] > _LARGEST:
        raise _refused(f"more than {_LARGEST:,} values", node)
    if isinstance(node, yaml.CollectionNode):
        for each in node.value:
            for child in each if isinstance(each, tuple) else (each,):
                _check_size(child, depth + 1, count)


def _refused(why: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, why, node.start_mark)
