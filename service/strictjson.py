"""JSON from strangers: one document, UTF-8, nothing that two readers could read differently."""

import json
from collections import Counter
from typing import Any, NoReturn

from service.errors import MalformedJson


def parse_json(body: bytes) -> Any:
    """Strict JSON: UTF-8 (a byte order mark is let through), no duplicate keys, NaN or Infinity.

    Raises MalformedJson with the offset where the parser knows it.
    """
    try:
        text = body.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise MalformedJson(f"byte {error.start} is not UTF-8", offset=error.start) from None
    except json.JSONDecodeError as error:
        raise MalformedJson(f"{error.msg} at character {error.pos}", offset=error.pos) from None
    except RecursionError:
        raise MalformedJson("the brackets are nested too deeply") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise MalformedJson("a number has too many digits") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise MalformedJson(f"the key {twice[:100]!r} appears twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise MalformedJson(f"{name} is not JSON")
