/* LoRA-Pro's full mode, between its two adjustments: the equivalent gradient g = left right of a layer, Adam's moments
   of it, their direction u, and left^T u and u right^T, row by row while they are in the cache; g and u are never
   stored. Compiled for RANK and the machine at hand by compiled.py. */
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

/* left (layers, d_out, 2 RANK), right (layers, 2 RANK, d_in), moments m, v (layers, d_out, d_in), eps (layers);
   writes grad_A (layers, RANK, d_in) and adds to grad_B (layers, d_out, RANK). ROWS divides d_out, WIDE * LANES d_in. */
void through_moments(size_t layers, size_t d_out, size_t d_in, in left, in right, out m, out v, float beta1,
                     float beta2, in eps, out grad_A, out grad_B) {
    float tile[2 * RANK * TILE] __attribute__((aligned(64))), sum[RANK * TILE] __attribute__((aligned(64)));
    for (size_t n = 0; n < layers; n++) {
        in L = left + n * d_out * 2 * RANK, R = right + n * 2 * RANK * d_in;
        for (size_t j = 0; j < d_in; j += TILE) {
            const size_t width = d_in - j < TILE ? d_in - j : TILE;
            for (int k = 0; k < 2 * RANK; k++) memcpy(tile + k * TILE, R + k * d_in + j, width * sizeof(float));
            memset(sum, 0, sizeof sum);
            for (size_t i = 0; i < d_out; i += ROWS) {
                const size_t at = (n * d_out + i) * d_in + j;
                rows(d_in, width, L + i * 2 * RANK, tile, m + at, v + at, beta1, beta2, eps[n], sum,
                     grad_B + (n * d_out + i) * RANK);
            }
            for (int k = 0; k < RANK; k++)
                memcpy(grad_A + (n * RANK + k) * d_in + j, sum + k * TILE, width * sizeof(float));
        }
    }
}
