"""YAML without the traps of version 1.1: `1e-3` is a number, `010` is none, and a key given twice is an error."""

import re
from typing import Any

import yaml


def parse(text: str) -> Any:
    """The value of a document; raises yaml.YAMLError."""
    return yaml.load(text, Loader)  # a SafeLoader


class Loader(yaml.SafeLoader):
    """SafeLoader with other rules for plain scalars, which refuses a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [
            key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)
        ]  # as written, `<<` not merged yet
        for key in {key for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: key '{key}' is given twice")
        return node


# 1.1 reads 010 as 8, 1:30 as 90, 2024-01-01 as a date, yes as true and 0x10 as 16; here they are what they look like.
Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.rpartition(":")[2] not in {"int", "float", "timestamp", "bool"}]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.\d*|\.\d+)$|^[-+]?\.(inf|nan)$"), list("-+0123456789.")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
