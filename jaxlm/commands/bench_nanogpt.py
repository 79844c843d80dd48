"""Times nanoGPT's own step for bench.py. Arguments: a checkout, GPTConfig as JSON, the batch size, and PyTorch's name
for the precision of float32 products (`highest`, or `medium` for operands rounded to bfloat16).

For each line of input, a number of steps, it prints the seconds per step. Eager mode in float32, with clipping and
AdamW as in nanoGPT's train.py.
"""

import importlib
import json
import sys
import time


def main() -> None:
    checkout, sizes, batch_size = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    sys.path[0] = checkout  # in place of this file's folder, whose inspect.py would hide Python's own
    # Imported by name, because type checkers find neither torch nor nanoGPT's model.py.
    torch, nanogpt = importlib.import_module("torch"), importlib.import_module("model")

    torch.set_float32_matmul_precision(sys.argv[4])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nanogpt.GPT(nanogpt.GPTConfig(**sizes)).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
    tokens = torch.randint(0, sizes["vocab_size"], (batch_size, sizes["block_size"] + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            _, loss = model(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
        print("seconds", (time.perf_counter() - start) / int(line), flush=True)


if __name__ == "__main__":
    main()
