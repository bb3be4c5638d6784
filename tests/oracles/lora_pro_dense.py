"""LoRA-Pro one layer at a time in float64 numpy, straight from the paper's formulas: what the batched code must equal.

LoRA-Pro (arXiv 2407.18242, theorem 2.1, algorithm 2). Pseudo-inverses of the damped Gram matrices, the Sylvester
equation as one Kronecker system. Slow on purpose; shares no code with lora_ga.
"""

import numpy as np


def closed_form(A, B, G_A, G_B, s, choice, delta=1e-8):
    """g_A (r, d_in), g_B (d_out, r)."""
    r = A.shape[0]
    BB, AA = B.T @ B, A @ A.T
    BB_inv = np.linalg.pinv(BB + delta * np.eye(r), rcond=1e-15)
    AA_inv = np.linalg.pinv(AA + delta * np.eye(r), rcond=1e-15)
    if choice == "zero":
        X = np.zeros((r, r))
    elif choice == "symmetric":
        X = -BB_inv @ B.T @ G_B @ AA_inv / (2 * s**2)
    else:
        C = -BB_inv @ G_A @ A.T / s**2
        kronecker = np.kron(np.eye(r), BB) + np.kron(AA.T, np.eye(r))  # acts on X stacked column by column
        X = np.linalg.solve(kronecker, C.flatten(order="F")).reshape((r, r), order="F")
    g_A = BB_inv @ G_A / s**2 + X @ A
    g_B = (np.eye(len(B)) - B @ BB_inv @ B.T) @ G_B @ AA_inv / s**2 - B @ X
    return g_A, g_B


class Adam:
    """Adam's direction of a matrix, bias-corrected from t = 1."""

    def __init__(self, shape, beta1=0.9, beta2=0.999, eps=1e-8):
        self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    def __call__(self, g):
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g * g
        m, v = self.m / (1 - self.beta1**self.t), self.v / (1 - self.beta2**self.t)
        return m / (np.sqrt(v) + self.eps)


class DensePro:
    """One layer's A and B, moved by LoRA-Pro."""

    def __init__(self, A, B, s, lr, mode, choice, weight_decay=0.0):
        self.A, self.B, self.s, self.lr, self.mode, self.choice = A.copy(), B.copy(), s, lr, mode, choice
        self.decay = 1 - lr * weight_decay
        self.full = Adam((len(B), A.shape[1]))
        self.of_A, self.of_B = Adam(A.shape), Adam(B.shape)

    def step(self, G_A, G_B):
        A, B, s = self.A, self.B, self.s
        if self.mode == "full":
            g_A, g_B = closed_form(A, B, G_A, G_B, s, "zero")
            u = self.full(s * B @ g_A + s * g_B @ A)
            g_A, g_B = closed_form(A, B, s * B.T @ u, s * u @ A.T, s, self.choice)
        else:
            g_A, g_B = closed_form(A, B, G_A, G_B, s, self.choice)
            g_A, g_B = self.of_A(g_A), self.of_B(g_B)
        self.A = self.decay * A - self.lr * g_A
        self.B = self.decay * B - self.lr * g_B
