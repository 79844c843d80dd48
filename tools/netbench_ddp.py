"""PyTorch's side of tools/netbench.py: a GPT under DistributedDataParallel on Gloo, with AdamW and clipping.

Arguments: sizes and PyTorch's name for the precision of products as JSON, the coordinator, the number of processes, and
the index of this one. For each line of input, `float32 STEPS` or `fp16 STEPS` (DDP's hook that sends float16), it
prints the seconds per step.
"""

import importlib
import json
import sys
import time
from typing import Any

# Imported by name, because torch is not there where types are checked.
torch: Any = importlib.import_module("torch")
F: Any = torch.nn.functional


def linear(i: int, o: int) -> Any:
    return torch.nn.Linear(i, o, bias=False)


class Block(torch.nn.Module):
    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(d, bias=False) for _ in range(2)])
        self.qkv, self.out, self.up, self.down = linear(d, 3 * d), linear(d, d), linear(d, 4 * d), linear(4 * d, d)

    def forward(self, x: Any) -> Any:
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norms[0](x)).split(d, 2))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))


class GPT(torch.nn.Module):
    def __init__(self, layers: int, d_model: int, heads: int, seq_len: int, vocab: int):
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(vocab, d_model), torch.nn.Embedding(seq_len, d_model)
        self.blocks = torch.nn.Sequential(*[Block(d_model, heads) for _ in range(layers)])
        self.norm, self.head = torch.nn.LayerNorm(d_model, bias=False), linear(d_model, vocab)

    def forward(self, inputs: Any, targets: Any) -> Any:
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    sizes, coordinator, count, index = sys.argv[1:]
    s = json.loads(sizes)
    distributed = importlib.import_module("torch.distributed")
    hooks = importlib.import_module("torch.distributed.algorithms.ddp_comm_hooks.default_hooks")
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(s["precision"])
    distributed.init_process_group("gloo", f"tcp://{coordinator}", world_size=int(count), rank=int(index))
    built = {}
    for name in ("float32", "fp16"):
        torch.manual_seed(0)
        gpt = GPT(s["layers"], s["d_model"], s["heads"], s["seq_len"], s["vocab"])
        model = torch.nn.parallel.DistributedDataParallel(gpt)
        if name == "fp16":
            model.register_comm_hook(None, hooks.fp16_compress_hook)
        built[name] = model, torch.optim.AdamW(model.parameters(), 1e-3)
    torch.manual_seed(int(index))
    inputs, targets = torch.randint(0, s["vocab"], (2, s["rows"], s["seq_len"]))
    for line in sys.stdin:
        name, steps = line.split()
        model, optimizer = built[name]
        start = time.perf_counter()
        for _ in range(int(steps)):
            loss = model(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
        print("seconds", (time.perf_counter() - start) / int(steps), flush=True)


if __name__ == "__main__":
    main()
