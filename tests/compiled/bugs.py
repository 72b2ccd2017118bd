"""Bugs that Triton's interpreter misses and that the execution of compiled kernels catches.

`TRITON_INTERPRET=1 python -m tests.compiled.bugs` prints what the interpreter says about each, as JSON.
"""

from __future__ import annotations

import json

from tests.compiled.outcomes import NOT_FINITE, WRONG_VALUES, Bug, values

ATTENTION = {"B": 1, "H": 2, "Tq": 70, "Tk": 70, "D": 16}
NORM = {"N": 200, "C": 64}

# A bug's name -> the bug, and what stops its check.
BUGS: dict[str, tuple[Bug, str]] = {
    "programs add to dQ without atomics": (
        Bug(
            "attention",
            (
                "backward",
                "tl.atomic_add(sums, dqt, mask=(offs_d < D)[:, None] & (offs_m < Tq)[None, :], "
                'sem="relaxed")',
                "inside = (offs_d < D)[:, None] & (offs_m < Tq)[None, :]\n"
                "        tl.store(sums, tl.load(sums, mask=inside) + dqt, mask=inside)",
            ),
            checks=[values("causal_attention", ATTENTION)],
            atomic=True,
        ),
        "race",
    ),
    "the sums of dQ are not cleared": (
        Bug(
            "attention",
            ("backward", "if sum_ptr is not None:", "if False:"),
            checks=[values("causal_attention", ATTENTION)],
            atomic=True,
        ),
        NOT_FINITE,
    ),
    "only the first batch stores where its documents start": (
        Bug(
            "attention",
            ("backward", "tl.min(start, 0), mask=pid_h == 0)", "tl.min(start, 0), mask=pid_bh == 0)"),
            checks=[values("causal_attention", {**ATTENTION, "B": 2}, key_start="documents")],
        ),
        WRONG_VALUES,
    ),
    "a row statistic is stored past the last query": (
        Bug(
            "attention",
            ("forward", "Tq + offs_m, lse2, mask=offs_m < Tq)", "Tq + offs_m, lse2)"),
            checks=[values("causal_attention", ATTENTION)],
        ),
        "oob_write",
    ),
    "the last split of decoding loads keys without a mask": (
        Bug(
            "attention",
            (
                "decode",
                "offs_n, stride_kt, end, D, BLOCK_D, True)",
                "offs_n, stride_kt, end, D, BLOCK_D, False)",
            ),
            checks=[values("decode_attention", {"B": 1, "H": 2, "Tq": 1, "Tmax": 70, "D": 16})],
        ),
        "oob_read",
    ),
    "parts of the keys are joined without acquire and release": (
        Bug(
            "attention",
            ("decode", 'sem="acq_rel"', 'sem="relaxed"'),
            checks=[values("decode_attention", {"B": 1, "H": 2, "Tq": 1, "Tmax": 70, "D": 16})],
        ),
        "race",
    ),
    "programs add to one row of dweight": (
        Bug(
            "norm",
            ("backward", "out = pid.to(tl.int64) * C + cols\n", "out = cols\n"),
            (
                "backward",
                "tl.store(dweight_ptr + out, tl.sum(dweight[i], 0), mask=cols < C)",
                "before = tl.load(dweight_ptr + out, mask=(cols < C) & (pid > 0), other=0.0)\n"
                "            tl.store(dweight_ptr + out, before + tl.sum(dweight[i], 0), mask=cols < C)",
            ),
            (
                "backward",
                "tl.store(dbias_ptr + out, tl.sum(dbias[i], 0), mask=cols < C)",
                "before = tl.load(dbias_ptr + out, mask=(cols < C) & (pid > 0), other=0.0)\n"
                "            tl.store(dbias_ptr + out, before + tl.sum(dbias[i], 0), mask=cols < C)",
            ),
            ("backward", "mask = (offs_p < P)[:, None]", "mask = (offs_p < 1)[:, None]"),
            checks=[values("layer_norm", NORM)],
        ),
        "race",
    ),
    "the statistics of rows past the end are stored": (
        Bug(
            "norm",
            (
                "forward",
                "tl.store(stats_ptr + N + offs_m, rstd, mask=mask_m)",
                "tl.store(stats_ptr + N + offs_m, rstd)",
            ),
            checks=[values("layer_norm", {"N": 5, "C": 17})],
        ),
        "oob_write",
    ),
    "the weight is read past its last column": (
        Bug(
            "norm",
            (
                "device_functions",
                "cols[None, :], mask=mask, other=0.0).to(tl.float32)\n\n",
                "cols[None, :]).to(tl.float32)\n\n",
            ),
            checks=[values("add_layer_norm", {"N": 5, "C": 17})],
        ),
        "oob_read",
    ),
    "GELU is stored past the last row, in the allocator's padding": (
        Bug(
            "ffn",
            (
                "gelu",
                "gelu(h, TANH).to(a_ptr.dtype.element_ty), mask=mask)\n\n\n",
                "gelu(h, TANH).to(a_ptr.dtype.element_ty), mask=(offs_n < F)[None, :])\n\n\n",
            ),
            checks=[
                values("gelu_ffn", {"N": 13, "C": 1, "I": 4})
            ],  # 208 bytes of a GPU's smallest block, 512
        ),
        "oob_write",
    ),
    "programs add to one row of the bias's gradient": (
        Bug(
            "ffn",
            (
                "gelu",
                "tl.store(dbias_ptr + pid_m.to(tl.int64) * F + offs_n, tl.sum(dbias, 0), mask=offs_n < F)",
                "before = tl.load(dbias_ptr + offs_n, mask=(offs_n < F) & (pid_m > 0), other=0.0)\n"
                "        zeros = tl.zeros([BLOCK_N], tl.float32)\n"
                "        tl.store(dbias_ptr + pid_m * F + offs_n, zeros, mask=offs_n < F)\n"
                "        tl.store(dbias_ptr + offs_n, before + tl.sum(dbias, 0), mask=offs_n < F)",
            ),
            checks=[values("gelu_ffn", {"N": 67, "C": 16, "I": 64})],
        ),
        "race",
    ),
    "the loss of an ignored row is not stored": (
        Bug(
            "loss",
            ("softmax", "tl.where(counted, loss, 0.0), mask=mask_m)", "loss, mask=counted)"),
            checks=[values("linear_cross_entropy", {"N": 9, "C": 16, "V": 50}, ignored="some")],
        ),
        NOT_FINITE,
    ),
    "gradients are stored past the end of the logits": (
        Bug(
            "loss",
            (
                "softmax",
                "mask = mask_m[:, None] & (offs_v < stride_ln)[None, :]\n            tl.store(",
                "mask = mask_m[:, None] & (offs_v < 4096)[None, :]\n            tl.store(",
            ),
            checks=[values("linear_cross_entropy", {"N": 7, "C": 16, "V": 150})],
        ),
        "oob_write",
    ),
}


def main() -> None:
    print(json.dumps({name: bug.interpreted() for name, (bug, _) in BUGS.items()}))


if __name__ == "__main__":
    main()
