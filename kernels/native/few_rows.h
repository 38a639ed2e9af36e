/* Few rows: codes go straight into registers. */
#ifndef PEQA_FEW_ROWS_H
#define PEQA_FEW_ROWS_H

#include "tile.h"

#define SHORT_PANELS ((size_t)1 << 16) /* bytes of codes up to which several panels are fetched ahead */
#define LITTLE_AHEAD 2048              /* bytes of codes */

INLINE void multiply_codes(const int R, const int V, const int bytes, const int32_t *xp, const vi *q,
                           vi (*part)[MAX_V])
{
    const size_t words = bytes ? QUADS : PAIRS;
    UNROLL for (int r = 0; r < R; r++)
    {
#if BYTE_DOTS
        /* Spelled out, or gcc reorders and spills. */
        const vi x = held(iset(xp[r * words]));
        if (bytes)
            UNROLL for (int v = 0; v < V; v++) __asm__ volatile("vpdpbusd %1, %2, %0"
                                                                : "+v"(part[r][v])
                                                                : "v"(x), "v"(q[v]));
        else
            UNROLL for (int v = 0; v < V; v++) __asm__ volatile("vpdpwssd %1, %2, %0"
                                                                : "+v"(part[r][v])
                                                                : "v"(x), "v"(q[v]));
#else
        const vi x = iset(xp[r * words]);
        UNROLL for (int v = 0; v < V; v++) part[r][v] = idot(part[r][v], q[v], x);
#endif
    }
}

/* Takes the pairs of one word after the other; `odd` takes every second one's products, where R * V sums alone would
 * leave the multipliers waiting for each other. */
INLINE void word_sums(const int R, const int V, const int bits, const int32_t *xp, vi *word, vi (*even)[MAX_V],
                      vi (*odd)[MAX_V])
{
    const int per_word = PAIRS_OF(bits);
    UNROLL for (int p = 0; p < per_word; p++)
    {
        vi q[MAX_V];
        UNROLL for (int v = 0; v < V; v++)
        {
            q[v] = low_pair(bits, word[v]);
            word[v] = next_pair(bits, word[v]);
        }
        multiply_codes(R, V, 0, xp + p, q, p % 2 ? odd : even);
    }
}

/* The same of quads: of 3 bits the first two of the word, whose last pair stays in `word`; `shift` is of its own
 * since 8 bits are not shifted at all. */
INLINE void word_bytes(const int R, const int V, const int bits, const int32_t *xp, vi *word, vi (*even)[MAX_V],
                       vi (*odd)[MAX_V])
{
    UNROLL for (int i = 0; i < (bits == 3 ? 2 : QUADS / bits); i++)
    {
        vi q[MAX_V];
        UNROLL for (int v = 0; v < V; v++)
        {
            if (bits == 3) {
                q[v] = quad_of(low_pair(3, word[v]), low_pair(3, next_pair(3, word[v])));
                word[v] = ishift(word[v], 6);
            } else {
                q[v] = bits == 8 ? word[v] : word[v] & iset(((1 << bits) - 1) * 0x1010101);
                word[v] = bits == 8 ? word[v] : next_pair(bits, word[v]);
            }
        }
        multiply_codes(R, V, 1, xp + i, q, i % 2 ? odd : even);
    }
}

/* The integer sums of one chain: `from` are its first codes, `xp` its first activations. Codes `ahead` bytes further on
 * are asked for line by line beside the work (0: not at all): all of a chain's at once wait for a core's few places (4
 * rows of a cold 4096 x 4096: 300 us so, 187 line by line). */
INLINE void chain_of_codes(const int R, const int V, const int bits, const int bytes, const int32_t **from,
                           const size_t ahead, const int32_t *xp, size_t units, vi (*part)[MAX_V])
{
    const size_t words = bytes ? QUADS : PAIRS;
    vi other[ROWS_MAX][MAX_V];
    vi(*odd)[MAX_V] = R * V <= 8 && R > 1 ? other : part;
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) part[r][v] = other[r][v] = iset(0);
    for (; units > 0; units--, xp += (size_t)R * words) {
        vi spare[MAX_V], last[MAX_V]; /* of 3 bits: pair 15, and the last pair of the word before */
        UNROLL for (int v = 0; v < V; v++) spare[v] = last[v] = iset(0);
        for (int w = 0; w < bits; w++) {
            vi word[MAX_V];
            UNROLL for (int v = 0; v < V; v++)
            {
                word[v] = held(iload(from[v]));
                if (ahead && v * VL % 16 == 0)
                    __builtin_prefetch((const char *)from[v] + ahead, 0, 2);
                from[v] += PANEL;
            }
            if (!bytes)
                word_sums(R, V, bits, xp + w * PAIRS_OF(bits), word, part, odd);
            else
                word_bytes(R, V, bits, xp + (bits == 3 ? (size_t)w * 5 / 2 : (size_t)w * QUADS / bits), word, part, odd);
            if (bits == 3)
                UNROLL for (int v = 0; v < V; v++)
                {
                    if (bytes) {
                        const vi pair = low_pair(3, word[v]);
                        last[v] = w == 1 ? quad_of(last[v], pair) : pair;
                        word[v] = next_pair(3, word[v]);
                    }
                    spare[v] |= spare_bit(word[v], w);
                }
            if (bits == 3 && bytes && w == 1)
                multiply_codes(R, V, 1, xp + 4, last, odd);
        }
        if (bits == 3) {
            if (bytes)
                UNROLL for (int v = 0; v < V; v++) spare[v] = quad_of(last[v], spare[v]);
            multiply_codes(R, V, bytes, xp + words - 1, spare, odd);
        }
    }
    if (odd != part)
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) part[r][v] += other[r][v];
}

/* R rows of one stripe times V vectors of lanes, from `lane` of `panel` on. */
INLINE void few_tile(const int R, const int V, const int bits, const int bytes, const int end, const job *j,
                     size_t panel, size_t lane, size_t stripe)
{
    const size_t row = stripe_start(stripe, j->rows), panels = V * VL > PANEL ? V * VL / PANEL : 1;
    const size_t segment = j->in.segments > 1 ? (size_t)panel_of(j, panel)[2] : 0;
    const size_t first = segment * j->rows + row;
    const int32_t *x = j->in.x + first * input_words(j->w, &j->c), *counts = j->in.counts + first * j->c.chains;
    const float *steps = j->in.steps + first * j->c.blocks;
    const size_t codes = panels * j->c.kp * PANEL * (size_t)bits / 8;
    /* What a stripe of several fetches ahead is for the first time that they come around to it; short panels are taken
     * so quickly that many would belong to another thread. */
    const size_t distance = stripe_count(j->rows) == 1 || codes <= SHORT_PANELS ? panels : j->stretch;
    /* Several long panels would leave the cache again before they are read: a little further on in each of them (2 rows
     * of a cold 4096 x 4096: 184 us without, 148 with; one row goes as fast as memory does without). */
    const int whole = stripe == 0 && (panels == 1 || codes <= SHORT_PANELS);
    const size_t ahead = whole ? distance * j->c.kp * PANEL * (size_t)bits / 8 : stripe == 0 && R > 1 ? LITTLE_AHEAD : 0;
    const int32_t *from[MAX_V];
    vf sum[ROWS_MAX][MAX_V];
    totals buffer, *const total = in_memory(&buffer);
    const int ends = end == END_ANY ? ends_of(j) : end;
    size_t in_block = 0;
    if (j->out_scale)
        fetch_out_scale(R, V, j, row, panel, lane);
    clear(R, V, total);
    UNROLL for (int v = 0; v < V; v++) from[v] = words_at(bits, j, panel, lane + (size_t)(v * VL));
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) sum[r][v] = vset(0.0f);
    for (size_t group = 0; group < (size_t)j->w->groups; group++)
        for (size_t at = 0; at < j->c.kg; at += CHAIN, counts += R) {
            const size_t length = smin(CHAIN, j->c.kg - at);
            vi part[ROWS_MAX][MAX_V];
            if (whole && lane == 0 && at == 0)
                for (size_t next = panel + distance; next < panel + distance + panels; next++)
                    fetch_scales(j, next, group);
            chain_of_codes(R, V, bits, bytes, from, ahead, x, length / UNIT, part);
            x += length / (bytes ? 4 : 2) * (size_t)R;
            if (ends == END_LATE) {
                end_plain_chain(R, V, steps, part, total);
                steps += R;
                continue;
            }
            end_chain(R, V, ends, j, row, panel, group, lane, counts, 0, part, sum);
            if (++in_block < j->c.block_chains)
                continue;
            end_block(R, V, steps, sum, total);
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) sum[r][v] = vset(0.0f);
            steps += R;
            in_block = 0;
        }
    if (in_block)
        end_block(R, V, steps, sum, total);
    end_rows(R, V, j, row, panel, lane, j->in.counts + first * j->c.chains, total);
}

#endif
