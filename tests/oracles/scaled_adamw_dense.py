"""Scaled AdamW one layer at a time in float64 numpy, as LoRA-One's first release ran it; shares no code with lora_ga.

Riemannian preconditioned LoRA (arXiv 2402.02347): no bias correction, B sees the A already moved and decayed.
"""

import numpy as np


class DenseScaled:
    """One layer's A and B, moved by scaled AdamW."""

    def __init__(self, A, B, lr, delta=1e-6, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
        self.A, self.B = A.copy(), B.copy()
        self.lr, self.delta, self.weight_decay = lr, delta, weight_decay
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.m_A, self.v_A, self.m_B, self.v_B = (np.zeros(x.shape) for x in (A, A, B, B))

    def step(self, G_A, G_B):
        eye = np.eye(self.A.shape[0])
        g = np.linalg.inv(self.B.T @ self.B + self.delta * eye) @ G_A
        self.m_A = self.beta1 * self.m_A + (1 - self.beta1) * g
        self.v_A = self.beta2 * self.v_A + (1 - self.beta2) * g * g
        self.A = self.A - self.lr * self.m_A / (np.sqrt(self.v_A) + self.eps)
        self.A = self.A - self.lr * self.weight_decay * self.A
        g = G_B @ np.linalg.inv(self.A @ self.A.T + self.delta * eye)
        self.m_B = self.beta1 * self.m_B + (1 - self.beta1) * g
        self.v_B = self.beta2 * self.v_B + (1 - self.beta2) * g * g
        self.B = self.B - self.lr * self.m_B / (np.sqrt(self.v_B) + self.eps)
        self.B = self.B - self.lr * self.weight_decay * self.B
