"""Where `param_groups` sends the parameters of sixteen architectures, built small from their configurations.

    pip install transformers peft        # beside torch; no weights are downloaded
    python benchmarks/routing_architectures.py [NAME …] [--table]

One line for each model, and for each kind of parameter with --table. A model fails when a matrix goes where it should
not: what has to be a matrix is written beside each model as patterns.
"""

import argparse
import importlib.util
import logging
import re
import sys
import warnings
from collections import Counter

import torch
from torch import nn

import guided_descent as gd

_find = importlib.util.find_spec
# A torchvision built for another torch stops transformers; none of these models needs it.
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "torchvision" else _find(name, *rest)
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


def tokens(*names: str, length: int = 8) -> dict[str, torch.Tensor]:
    return {name: torch.arange(2 * length).view(2, length) % 50 for name in names}


def hf(kind: str, example, config: str | None = None, **sizes):
    def build():
        import transformers

        stem = re.sub(r"(For|LMHead|Model$).*", "", kind)
        made = getattr(transformers, config or f"{stem}Config")(**sizes)
        if kind == "CLIPModel":
            made.text_config.eos_token_id = 2
        return getattr(transformers, kind)(made), example

    return build


def lora():
    import peft

    model, example = ARCHITECTURES["GPT-2"][0]()
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    return peft.get_peft_model(model, config), example


class Encoder(nn.Module):
    """Torch's own encoder, with an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.body(self.embed(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(50, 32), nn.LSTM(32, 32, 2, batch_first=True), nn.Linear(32, 50)

    def forward(self, x):
        return self.head(self.lstm(self.embed(x))[0])


GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
BERT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA = {**BERT, "num_key_value_heads": 2}
IMAGE = {"pixel_values": torch.zeros(1, 3, 32, 32)}
VIT = {"image_size": 32, "patch_size": 8}
ENCODER = {x: v for x, v in BERT.items() if x != "vocab_size"}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
WHISPER = {"vocab_size": 50, "d_model": 32, "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 16}
WHISPER |= {
    f"{x}_{y}": v for x in ("encoder", "decoder") for y, v in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
WHISPER |= {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
MEL = {"input_features": torch.zeros(1, 16, 32), **tokens("decoder_input_ids")}
CLIP = {"text_config": {**BERT, "bos_token_id": 1, "eos_token_id": 2}, "vision_config": {**ENCODER, **VIT}}
CLIP |= {"projection_dim": 16}
IDS = tokens("input_ids")

#: Build; patterns of what is a matrix. What no pattern names must be none.
BERTS = [r"attention\.\S*(query|key|value|dense)", r"layer\.\*\.(intermediate|output)\.dense"]
TOWERS = [r"[qkv]_proj", r"out_proj", r"fc[12]"]
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
MAMBA = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
EXPERTS = {"num_local_experts": 4, "head_dim": 8, **LLAMA}
BOTH = tokens("input_ids", "decoder_input_ids")
ARCHITECTURES = {
    "GPT-2": (hf("GPT2LMHeadModel", IDS, **GPT2), [r"c_attn", r"c_proj", r"c_fc"]),
    "Llama": (hf("LlamaForCausalLM", IDS, **LLAMA), [r"[qkvo]_proj", r"mlp\.\w+_proj"]),
    "BERT, masked words": (hf("BertForMaskedLM", IDS, **BERT), [*BERTS, r"transform\.dense"]),
    "BERT, classes": (hf("BertForSequenceClassification", IDS, **BERT), [*BERTS, r"pooler\.dense"]),
    "ViT": (hf("ViTForImageClassification", IMAGE, **ENCODER, **VIT), [r"layers?\.\*\.(attention|mlp)\S*"]),
    "ResNet": (hf("ResNetForImageClassification", IMAGE, **RESNET), [r"convolution"]),
    "T5": (hf("T5ForConditionalGeneration", BOTH, **T5), [r"Attention\.[qkvo]\.", r"\.w[io]\."]),
    "Mixtral": (hf("MixtralForCausalLM", IDS, num_local_experts=4, **LLAMA), [r"[qkvo]_proj", r"experts"]),
    "GPT-OSS": (hf("GptOssForCausalLM", IDS, **EXPERTS), [r"[qkvo]_proj", r"experts\.\w+_proj$"]),
    "Llama 4": (
        hf("Llama4ForCausalLM", IDS, "Llama4TextConfig", intermediate_size_mlp=64, **EXPERTS),
        [r"[qkvo]_proj", r"experts", r"shared_expert"],
    ),
    "Mamba": (hf("MambaForCausalLM", IDS, **MAMBA), [r"(in|x|dt|out)_proj"]),
    "Whisper": (hf("WhisperForConditionalGeneration", MEL, **WHISPER), [*TOWERS, r"encoder\.conv"]),
    "CLIP": (hf("CLIPModel", {**IDS, **IMAGE}, **CLIP), TOWERS),
    "LoRA of GPT-2": (lora, [r"lora_[AB]"]),
    "TransformerEncoder": (lambda: (Encoder(), tokens("x")["x"]), [r"in_proj_weight", r"out_proj", r"linear[12]"]),
    "LSTM": (lambda: (Recurrent(), tokens("x")["x"]), [r"weight_[ih]h"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*ARCHITECTURES])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    failed = 0
    for name in options.names:
        build, matrices = ARCHITECTURES[name]
        torch.manual_seed(0)
        model, example = build()
        groups = gd.param_groups(model, example)
        kinds, wrong = {}, []
        for route in groups.routes:
            place = re.sub(r"\.\d+\b", ".*", route.name)
            many = len(route.shape) > 1 and route.method != "-"
            wanted = many and any(re.search(x, place) for x in matrices)
            if wanted != (route.method == "matrix"):
                wrong.append(place)
            kinds.setdefault((place, route.shape, route.method, route.reason), []).append(route)
        optimizer = gd.Muon(groups, lr=1e-3)
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
        count = Counter(route.method for route in groups.routes)
        said = f"WRONG: {', '.join(dict.fromkeys(wrong))}" if wrong else "as expected"
        heads = [r.name for r in groups.routes if r.reason.startswith("output layer") or "tied" in r.reason]
        print(f"{name:>20}: {count['matrix']:3} matrices, {count['adamw']:3} by AdamW; head {', '.join(heads)}; {said}")
        failed += bool(wrong)
        for place, shape, method, reason in kinds if options.table else ():
            print(f"    {place:<70} {'×'.join(map(str, shape)):>10}  {method:<6}  {reason}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
