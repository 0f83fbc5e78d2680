"""YAML as people write it: `1e-5` is a number, as in YAML 1.2.

PyYAML keeps to YAML 1.1, where scientific notation needs a point and a sign (`1.0e-5`) and all else
is text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_SCIENTIFIC = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Reads scientific notation as numbers."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+.0123456789"))


def read(text: str) -> Any:
    """The value that YAML text stands for. Raises yaml.YAMLError if it is not YAML."""
    return yaml.load(text, Loader=_Loader)


def write(value: Any) -> str:
    """Plain values as YAML text, mappings in their own order; `read` gives them back."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
