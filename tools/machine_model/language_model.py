"""A language model as the machine sees it: shapes, bytes of weights, FLOPs."""

from dataclasses import dataclass

from kvfs.layout import KvGeometry

ITEM_BYTES = 2  # weights and activations in 16 bits


@dataclass(frozen=True)
class LanguageModel:
    """mlp_matrices: 2 (up, down) or 3 (gate, up, down); tied: input and output embedding are one matrix"""

    name: str
    title: str
    geometry: KvGeometry
    hidden_size: int
    intermediate_size: int
    mlp_matrices: int
    vocab_size: int
    source: str
    tied: bool = False

    @property
    def attention_weights(self) -> int:
        """Elements of one layer's projections q, k, v and out."""
        geometry = self.geometry
        return 2 * (geometry.num_query_heads + geometry.num_kv_heads) * geometry.head_dim * self.hidden_size

    @property
    def mlp_weights(self) -> int:
        """Elements, of one layer."""
        return self.mlp_matrices * self.hidden_size * self.intermediate_size

    @property
    def layer_bytes(self) -> int:
        """Weights of one layer."""
        return ITEM_BYTES * (self.attention_weights + self.mlp_weights)

    @property
    def weights_bytes(self) -> int:
        """All layers and the embeddings."""
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.hidden_size
        return self.geometry.num_layers * self.layer_bytes + ITEM_BYTES * embeddings

    @property
    def token_bytes(self) -> int:
        """K and V of one token, all layers, in memory."""
        return self.geometry.token_bytes

    @property
    def layer_token_bytes(self) -> int:
        return self.token_bytes // self.geometry.num_layers

    @property
    def rho(self) -> float:
        """Bytes of X over those of K and V."""
        return self.hidden_size / (2 * self.geometry.num_kv_heads * self.geometry.head_dim)

    @property
    def kv_weights(self) -> int:
        """Elements of one layer's K and V projections."""
        return 2 * self.geometry.num_kv_heads * self.geometry.head_dim * self.hidden_size
