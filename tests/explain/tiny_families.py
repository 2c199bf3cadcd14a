"""Tiny random models of many architectures, with inputs and what to explain of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

COMMON = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 61, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GQA = {"num_key_value_heads": 2, "head_dim": 8}
IMAGE = {"image_size": 32, "patch_size": 8, "num_channels": 3}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}

Built = tuple[nn.Module, dict[str, Any], Any]


def ids(length: int = 7, batch: int = 2) -> Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(3))


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4))


def text(config: str, model: str, **changes: Any) -> Callable[[], Built]:
    def build() -> Built:
        found = getattr(hf, model)(getattr(hf, config)(**{**TEXT, **COMMON, **changes}))
        return found, {"input_ids": ids()}, None

    return build


def vision(config: str, model: str, **changes: Any) -> Callable[[], Built]:
    def build() -> Built:
        found = getattr(hf, model)(getattr(hf, config)(**changes))
        return found, {"pixel_values": image(changes.get("image_size", 32))}, None

    return build


def t5() -> Built:
    config = hf.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config), {"input_ids": ids(), "decoder_input_ids": ids(4)}, None


def whisper() -> Built:
    config = hf.WhisperConfig(
        vocab_size=61, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=10,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    sound = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(5))
    return hf.WhisperForConditionalGeneration(config), {"input_features": sound, "decoder_input_ids": ids(4)}, None


def wav2vec2() -> Built:
    config = hf.Wav2Vec2Config(
        vocab_size=20, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, num_feat_extract_layers=2, **COMMON,
    )  # fmt: skip
    sound = torch.randn(2, 200, generator=torch.Generator().manual_seed(6))
    return hf.Wav2Vec2ForCTC(config), {"input_values": sound}, None


def siglip() -> Built:
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**COMMON, **IMAGE))
    return model, {"pixel_values": image()}, lambda output: output.pooler_output[:, 3]


def pix2struct() -> Built:
    config = hf.Pix2StructVisionConfig(
        hidden_size=32, patch_embed_hidden_size=48, d_ff=48, d_kv=8, num_hidden_layers=2, num_attention_heads=4,
        seq_len=16,
    )  # fmt: skip
    patches = torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(7))
    patches[..., :2] = torch.arange(1, 7)[None, :, None].float()
    return hf.Pix2StructVisionModel(config), {"flattened_patches": patches}, lambda out: out[0][:, 2, 3]


MAMBA = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0}

FAMILIES: dict[str, Callable[[], Built]] = {
    "gpt2": text("GPT2Config", "GPT2LMHeadModel", n_embd=32, n_head=4, n_layer=2, n_positions=32),
    "gpt-neox": text("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "opt": text("OPTConfig", "OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=32),
    "llama": text("LlamaConfig", "LlamaForCausalLM", **GQA),
    "qwen3": text("Qwen3Config", "Qwen3ForCausalLM", **GQA),
    "gemma2": text("Gemma2Config", "Gemma2ForCausalLM", **GQA, query_pre_attn_scalar=8, sliding_window=4),
    "gemma3": text("Gemma3TextConfig", "Gemma3ForCausalLM", **GQA, query_pre_attn_scalar=8, sliding_window=4),
    "mixtral": text("MixtralConfig", "MixtralForCausalLM", **GQA, num_local_experts=4),
    "bert": text("BertConfig", "BertForSequenceClassification"),
    "roberta": text("RobertaConfig", "RobertaForSequenceClassification", max_position_embeddings=40),
    "deberta": text(
        "DebertaV2Config", "DebertaV2ForSequenceClassification", relative_attention=True, max_relative_positions=8,
        pos_att_type=["p2c", "c2p"], position_biased_input=False,
    ),
    "t5": t5,
    "mamba": text("MambaConfig", "MambaForCausalLM", **MAMBA),
    "mamba2": text("Mamba2Config", "Mamba2ForCausalLM", **MAMBA, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
    "vit": vision("ViTConfig", "ViTForImageClassification", **COMMON, **IMAGE, num_labels=5),
    "resnet": vision(
        "ResNetConfig", "ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 2, 1], num_labels=5,
    ),
    "convnext": vision(
        "ConvNextConfig", "ConvNextForImageClassification", hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 2, 1],
        num_labels=5, layer_scale_init_value=0.5,
    ),
    "swin": vision("SwinConfig", "SwinForImageClassification", **SWIN, num_labels=5),
    "siglip": siglip,
    "whisper": whisper,
    "wav2vec2": wav2vec2,
    "pix2struct": pix2struct,
}  # fmt: skip


class VGG(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
            nn.Linear(144, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5),
        )  # fmt: skip


class Block(nn.Module):
    """A residual block that adds in its forward, where hooks on modules see nothing."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and width == out
        self.down = nn.Identity() if same else nn.Sequential(nn.Conv2d(width, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        return self.relu(y)


class ResNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            Block(8, 8, 1), Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        )  # fmt: skip


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.deep, self.up = nn.Conv2d(8, 16, 3, 2, 1), nn.ConvTranspose2d(16, 8, 2, 2)
        self.resize, self.out = nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = nn.functional.silu(self.norm(self.down(x)))
        deep = nn.functional.elu(self.deep(nn.functional.avg_pool2d(first, 1)))
        return self.out(torch.cat([first, self.up(deep), self.resize(deep)], 1))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, num_layers=2, batch_first=True, bidirectional=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


def _own(make: Callable[[], nn.Module], x: Callable[[], Tensor], target: Any = None) -> Callable[[], Built]:
    def build() -> Built:
        return make(), {"x" if not isinstance(make(), nn.Sequential) else "input": x()}, target

    return build


def _sequence(width: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 6, width, generator=torch.Generator().manual_seed(8))


OWN: dict[str, Callable[[], Built]] = {
    "vgg": _own(VGG, lambda: image(16)),
    "resnet-own": _own(ResNet, lambda: image(16)),
    "unet": _own(UNet, lambda: image(8), lambda output: output[:, 1, 3, 4]),
    "lstm": _own(LSTM, _sequence(6)),
    "encoder": _own(Encoder, _sequence(16)),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Built:
    """Return model, inputs and target; weights large enough that no operator is near linear."""
    torch.manual_seed(0)
    model, inputs, target = (FAMILIES | OWN)[name]()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=1.4 * p[0].numel() ** -0.5)
            elif "bias" in key or "beta" in key:
                p.normal_(std=0.1)
        for key, b in model.named_buffers():
            if "running_mean" in key:
                b.normal_(std=0.3)
            if "running_var" in key:
                b.uniform_(0.5, 2)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    if dtype == torch.float64 and hasattr(model, "config"):
        model.config._experts_implementation = "eager"  # the grouped product knows no float64
    return model.eval().to(dtype), inputs, target


def word_tokenizer(words: list[str]) -> Any:
    """Make a tokenizer of whole words; the first is for unknown ones."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0])


def saved_decoder(folder: Path, words: list[str], kind: str = "llama") -> str:
    """Save a tiny decoder with a tokenizer of whole words; return where."""
    word_tokenizer(words).save_pretrained(folder / kind)
    make(kind)[0].save_pretrained(folder / kind)
    return str(folder / kind)
