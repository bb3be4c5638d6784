/* LoRA-Pro's full mode, between its two adjustments: the equivalent gradient g = left right of a layer, where left is
   [B g_B] and right is scaling [g_A; A], Adam's moments of it, their direction u, and B^T u and scaling u A^T, row by
   row while they are in the cache; g and u are never stored. Compiled for RANK and the machine at hand by compiled.py.
*/
#include <math.h>
#include <stddef.h>
#include <string.h>

enum { LANES = 16, WIDE = 2, ROWS = 4, TILE = 576, FEW = 2 };

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float *restrict out;
typedef const float *restrict in;
#define LOAD(p) (*(const vec *)(p))
#define STORE(p, x) (*(vec *)(p) = (x))

/* ROWS rows of a layer, `width` columns of them; left (ROWS, 2 RANK), right (2 RANK, TILE). */
static void rows(size_t d_in, size_t width, in left, in right, out m, out v, float beta1, float beta2, float eps,
                 out grad_A, out grad_B) {
    float u[ROWS][TILE] __attribute__((aligned(64)));
    for (size_t j = 0; j < width; j += WIDE * LANES) {
        vec g[ROWS][WIDE] = {0};
#pragma GCC unroll 64
        for (int k = 0; k < 2 * RANK; k++) {
            vec r[WIDE];
#pragma GCC unroll 8
            for (int w = 0; w < WIDE; w++) r[w] = LOAD(right + k * TILE + j + w * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
                for (int w = 0; w < WIDE; w++) g[i][w] += left[i * 2 * RANK + k] * r[w];
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
            for (int w = 0; w < WIDE; w++) {
                const size_t at = i * d_in + j + w * LANES;
                __builtin_prefetch(m + at + ROWS * d_in, 1); /* the next rows: no pattern tells the machine */
                __builtin_prefetch(v + at + ROWS * d_in, 1);
                const vec first = beta1 * LOAD(m + at) + (1 - beta1) * g[i][w];
                STORE(m + at, first);
                STORE(v + at, beta2 * LOAD(v + at) + (1 - beta2) * g[i][w] * g[i][w]);
                STORE(&u[i][j + w * LANES], first);
            }
    }
    for (int i = 0; i < ROWS; i++)
#pragma GCC ivdep
        for (size_t j = 0; j < width; j++) u[i][j] /= sqrtf(v[i * d_in + j]) + eps;
    for (int some = 0; some < RANK; some += FEW) { /* as many sums and coefficients at a time as there are registers */
        vec sums[ROWS][FEW] = {0}, coefficient[ROWS][FEW];
        for (int i = 0; i < ROWS; i++)
            for (int k = 0; k < FEW; k++) coefficient[i][k] = (vec){0} + left[i * 2 * RANK + some + k];
        for (size_t j = 0; j < width; j += LANES) {
            vec x[ROWS];
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) x[i] = LOAD(&u[i][j]);
#pragma GCC unroll 8
            for (int k = 0; k < FEW; k++) {
                const vec r = LOAD(right + (RANK + some + k) * TILE + j);
                vec a = LOAD(grad_A + (some + k) * TILE + j);
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++) {
                    sums[i][k] += x[i] * r;
                    a += coefficient[i][k] * x[i];
                }
                STORE(grad_A + (some + k) * TILE + j, a);
            }
        }
        for (int i = 0; i < ROWS; i++)
            for (int k = 0; k < FEW; k++)
                for (int l = 0; l < LANES; l++) grad_B[i * RANK + some + k] += sums[i][k][l];
    }
}

/* B, g_B (layers, d_out, RANK), g_A, A (layers, RANK, d_in), moments m, v (layers, d_out, d_in), eps (layers); writes
   B^T u to grad_A (layers, RANK, d_in) and adds scaling u A^T to grad_B (layers, d_out, RANK). ROWS divides d_out,
   WIDE * LANES d_in. */
void through_moments(size_t layers, size_t d_out, size_t d_in, in B, in g_B, in g_A, in A, float scaling, out m, out v,
                     float beta1, float beta2, in eps, out grad_A, out grad_B) {
    float right[2 * RANK * TILE] __attribute__((aligned(64))), sum[RANK * TILE] __attribute__((aligned(64)));
    float left[ROWS * 2 * RANK];
    for (size_t n = 0; n < layers; n++)
        for (size_t j = 0; j < d_in; j += TILE) {
            const size_t width = d_in - j < TILE ? d_in - j : TILE;
            for (size_t k = 0; k < RANK; k++)
                for (size_t w = 0; w < width; w++) {
                    right[k * TILE + w] = scaling * g_A[(n * RANK + k) * d_in + j + w];
                    right[(RANK + k) * TILE + w] = scaling * A[(n * RANK + k) * d_in + j + w];
                }
            memset(sum, 0, sizeof sum);
            for (size_t row = n * d_out; row < (n + 1) * d_out; row += ROWS) {
                for (size_t i = 0; i < ROWS; i++) {
                    memcpy(left + i * 2 * RANK, B + (row + i) * RANK, RANK * sizeof(float));
                    memcpy(left + (i * 2 + 1) * RANK, g_B + (row + i) * RANK, RANK * sizeof(float));
                }
                rows(d_in, width, left, right, m + row * d_in + j, v + row * d_in + j, beta1, beta2, eps[n], sum,
                     grad_B + row * RANK);
            }
            for (size_t k = 0; k < RANK; k++)
                memcpy(grad_A + (n * RANK + k) * d_in + j, sum + k * TILE, width * sizeof(float));
        }
}
