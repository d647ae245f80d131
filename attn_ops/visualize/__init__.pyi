# Written by tests/package/stub.py, which tests compare it with.

from collections.abc import Iterator
from typing import Any

__all__ = ['attention', 'ModelAttention', 'LayerAttention', 'viewer', 'Viewer', 'plot_attention_weights', 'plot_attention_over_text', 'plot_heads', 'plot_mask']

def attention(
    model: Any,
    inputs: Any,
    layers: Any = None,
    *,
    tokens: Any = None,
    longest: Any = 512,
    top_keys: Any = 8,
    max_bytes: Any = 1073741824,
) -> ModelAttention: ...
def plot_attention_over_text(
    weights: Any,
    tokens: Any = None,
    *,
    query: int | None = None,
    example: int = 0,
    heads: Any = None,
    title: str | None = None,
    cmap: str = 'Blues',
    vmax: float | None = None,
    power: float = 1.0,
    ax: Any = None,
    width: float = 8.0,
) -> Any: ...
def plot_attention_weights(
    weights: Any,
    query_tokens: Any = None,
    key_tokens: Any = None,
    *,
    example: int = 0,
    heads: Any = None,
    title: str | None = None,
    annotate: bool = False,
    cmap: str = 'Blues',
    figure: Any = None,
    ax: Any = None,
    vmax: float | None = None,
    power: float = 1.0,
    crop: bool = False,
) -> Any: ...
def plot_heads(
    attention: Any,
    *,
    example: int = 0,
    cmap: str = 'Blues',
    power: float = 0.5,
    crop: bool = True,
    title: str | None = None,
    figure: Any = None,
) -> Any: ...
def plot_mask(
    mask: Any,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    entry: int = 0,
    head: int = 0,
    query_offset: Any = None,
    block: tuple[int, int] = (64, 128),
    title: str | None = None,
    ax: Any = None,
) -> Any: ...
def viewer(
    attention: Any,
    path: Any = None,
    *,
    example: Any = 0,
    image: Any = None,
    grid: Any = None,
    title: Any = None,
    max_bytes: Any = 16777216,
) -> Viewer: ...
class LayerAttention:
    name: str
    cls: str
    shape: tuple[int, int, int, int]
    weights: Any
    hidden: Any
    blocks: Any
    real_rows: Any
    real_keys: Any
    entropy: Any
    distance: Any
    received: Any
    query_tokens: list[Any] | None
    key_tokens: list[Any] | None
    def __init__(
        self,
        name: str,
        cls: str,
        shape: tuple[int, int, int, int],
        weights: Any,
        hidden: Any,
        blocks: Any,
        real_rows: Any,
        real_keys: Any,
        entropy: Any,
        distance: Any,
        received: Any,
        query_tokens: list[Any] | None = None,
        key_tokens: list[Any] | None = None,
    ) -> None: ...
    @property
    def heads(self) -> int: ...
    @property
    def of_one_sequence(self) -> bool: ...
class ModelAttention:
    model: Any
    layers: Any
    left_out: Any
    def __init__(self, model: str, layers: Any, left_out: Any = None) -> None: ...
    @classmethod
    def from_weights(
        cls,
        weights: Any,
        *,
        tokens: Any = None,
        hidden: Any = None,
        model: Any = 'weights',
        longest: Any = 512,
        top_keys: Any = 8,
    ) -> Any: ...
    @property
    def names(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __getitem__(self, name: Any) -> Any: ...
class Viewer:
    title: Any
    def __init__(self, title: str, header: str, data: bytes) -> None: ...
    @property
    def html(self) -> Any: ...
    def save(self, path: Any) -> Any: ...
    def widget(self) -> Any: ...
