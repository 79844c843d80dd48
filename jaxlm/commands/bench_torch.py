"""Times a step of the same model in PyTorch for `jaxlm bench --torch`. Argument: its sizes, as JSON.

For each line of input, a number of steps, it prints the seconds per step and the peak bytes of the GPU (0: none). The
decoder is written as PyTorch users write it today: scaled_dot_product_attention, fused AdamW, on GPUs torch.compile,
and autocast if the model computes in bfloat16. Shapes are named as in jaxlm/model/blocks.py.
"""

import importlib
import json
import sys
import time
from typing import Any

sys.path.pop(0)  # this file's folder, whose inspect.py would hide Python's own
# Imported by name, because type checkers find no torch.
torch: Any = importlib.import_module("torch")
nn, F = torch.nn, torch.nn.functional


class Attention(nn.Module):
    def __init__(self, s: dict):
        super().__init__()
        D, self.H, self.K, self.C = s["d_model"], s["num_heads"], s["num_kv_heads"], s["d_model"] // s["num_heads"]
        self.qkv = nn.Linear(D, (self.H + 2 * self.K) * self.C, bias=s["use_bias"])
        self.out = nn.Linear(D, D, bias=s["use_bias"])
        self.norms = nn.ModuleList([nn.RMSNorm(self.C, eps=1e-6) for _ in range(2)]) if s["qk_norm"] else None

    def forward(self, x_BTD: Any, rope: Any) -> Any:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(B, T, -1, self.C).transpose(1, 2).split([self.H, self.K, self.K], dim=1)
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.H != self.K)
        return self.out(o.transpose(1, 2).reshape(B, T, D))


def rotate(x_BHTC: Any, rope: Any) -> Any:
    """RoPE; `rope` is (cos, sin), each `[T, C / 2]`."""
    (cos, sin), (a, b) = rope, x_BHTC.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_BHTC.dtype)


class Mlp(nn.Module):
    def __init__(self, s: dict):
        super().__init__()
        self.gated = s["activation"] == "swiglu"
        self.up = nn.Linear(s["d_model"], s["d_ff"], bias=s["use_bias"])
        self.gate = nn.Linear(s["d_model"], s["d_ff"], bias=s["use_bias"]) if self.gated else None
        self.down = nn.Linear(s["d_ff"], s["d_model"], bias=s["use_bias"])

    def forward(self, x: Any) -> Any:
        if self.gate is not None:
            return self.down(self.up(x) * F.silu(self.gate(x)))
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, s: dict):
        super().__init__()
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = norm(s), Attention(s), norm(s), Mlp(s)

    def forward(self, x: Any, rope: Any) -> Any:
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


def norm(s: dict) -> Any:
    if s["norm"] == "rmsnorm":
        return nn.RMSNorm(s["d_model"], eps=1e-6)
    return nn.LayerNorm(s["d_model"], bias=s["use_bias"])


class Decoder(nn.Module):
    def __init__(self, s: dict):
        super().__init__()
        D, V, C = s["d_model"], s["vocab_size"], s["d_model"] // s["num_heads"]
        self.embed = nn.Embedding(V, D)
        self.positions = nn.Embedding(s["seq_len"], D) if s["position"] == "learned" else None
        self.blocks = nn.ModuleList([Block(s) for _ in range(s["num_layers"])])
        self.final_norm = norm(s)
        self.head = nn.Linear(D, V, bias=False)
        if s["tie_embeddings"]:
            nn.init.normal_(self.embed.weight, std=0.02)
            self.head.weight = self.embed.weight
        angles = torch.outer(torch.arange(s["seq_len"]), s["rope_theta"] ** -(torch.arange(0, C, 2) / C))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens_BT: Any, targets_BT: Any) -> Any:
        x, rope = self.embed(tokens_BT), (self.cos, self.sin)
        if self.positions is not None:
            x, rope = x + self.positions.weight, None
        for block in self.blocks:
            x = block(x, rope)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets_BT.flatten())


def main() -> None:
    s = json.loads(sys.argv[1])
    torch.set_float32_matmul_precision(s["precision"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = Decoder(s)
        tokens = torch.randint(0, s["vocab_size"], (s["accum_steps"], s["rows"], s["seq_len"] + 1))
    found = sum(p.numel() for p in model.parameters())
    assert found == s["parameters"], f"{found:,} parameters, not {s['parameters']:,} as in JAX"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = torch.compile(model) if device == "cuda" else model
    autocast = torch.autocast(device, torch.bfloat16, enabled=s["dtype"] == "bfloat16")
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            for micro in tokens:
                with autocast:
                    loss = run(micro[:, :-1], micro[:, 1:])
                (loss / len(tokens)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        print("seconds", (time.perf_counter() - start) / int(line), peak, flush=True)


if __name__ == "__main__":
    main()
