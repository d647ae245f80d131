"""Defects to plant: (name, file, text, what it becomes). The text occurs once in its file (test_defects.py), so that a defect is what
its name says for as long as the code is that."""

CPU, PACKAGE = "csrc/cpu/", "attn_ops/"

KERNELS = [
    ("steps begin late", CPU + "staircase.h", "begin / kStepKeys * kStepKeys", "(begin + kStepKeys - 1) / kStepKeys * kStepKeys"),
    ("no rescale of the output", CPU + "row_lanes.h", "S::store(at, S::fma(S::load(at), correction[v], x));", "S::store(at, S::load(at) + x);"),
    ("no rescale of the sum", CPU + "row_lanes.h", "S::fma(S::load(tile.l + v * W), correction[v], sum[v])", "S::load(tile.l + v * W) + sum[v]"),
    ("splits are merged without weights", CPU + "row_lanes.h", "l += weight * part[1];", "l += part[1];"),
    ("the maximum of a split is lost", CPU + "row_lanes.h", "if (m_s > m || m_s != m_s) m = m_s;", "if (s == 0 || m_s != m_s) m = m_s;"),
    ("causal sees one key more", "csrc/mask.h", "r.end = own + m.window_right + 1;", "r.end = own + m.window_right + 2;"),
    ("windows see one key less", "csrc/mask.h", "r.begin = own - m.window_left;", "r.begin = own - m.window_left + 1;"),
    ("rows of padding see keys", "csrc/mask.h", "if (i >= length_q) return {length_k, length_k};", ""),
    ("bottom right by the other sign", "csrc/mask.h", "return m.bottom_right ? length_k - length_q : 0;", "return m.bottom_right ? length_q - length_k : 0;"),
    ("offsets of the first sequence", "csrc/mask.h", "m.query_offset[batch * m.offset_stride]", "m.query_offset[0]"),
    ("intervals of the first sequence", "csrc/mask.h", "const int64_t at = batch * m.interval_stride + i;", "const int64_t at = i;"),
    ("the wrong kv head", "csrc/attention.h", "return p.num_kv_heads ? p.num_heads / p.num_kv_heads : 1;", "return 1;"),
    ("rows of a mask end with a word", CPU + "mask_bits.h", "const bool crosses = shift + count > 64;", "const bool crosses = false;"),
    ("six rounds of Philox", CPU + "philox.h", "kRounds = 7", "kRounds = 6"),
    ("dropout of the first sequence", CPU + "philox.h", "static_cast<uint32_t>(batch) * p.dropout_origin.heads_of_entry", "0"),
    ("a stale counter of dropout", CPU + "philox.h", "d.first_key + static_cast<uint32_t>(k0)", "d.first_key"),
    ("dropout without rescale", CPU + "philox.h", "keep_scale(1.0 / (1.0 - p.dropout_rate))", "keep_scale(1.0)"),
    ("the offset of dropout's seed", CPU + "philox.h", "Words{} + d.offset}", "Words{}}"),
    ("a row of nothing is NaN", CPU + "scores.h", "return Simd<T>::select(m == Simd<T>::set1(-kInfinity<T>), Simd<T>::zero(), m);", "return m;"),
    ("the cap has no slope", CPU + "scores.h", "S::store(slopes, S::set1(1) - t * t);", "S::store(slopes, S::set1(1));"),
    ("slopes of the first sequence", CPU + "scores.h", "[r.batch * r.p.slopes_stride + head]", "[head]"),
    ("distances clipped one short", CPU + "scores.h", "distance > reach ? reach : distance) + reach", "distance > reach - 1 ? reach - 1 : distance) + reach"),
    ("bias of -inf does not hide", CPU + "scores.h", "S::select(bias == hidden, hidden, S::select(finite == S::zero(), inside, sum))", "inside"),
    ("a sink counts twice", CPU + "row_tile.h", "*l = *l * correction + exp_of(sink - highest);", "*l = *l * correction + 2 * exp_of(sink - highest);"),
    ("lse without its maximum", CPU + "row_tile.h", "plus_log(m, l)", "plus_log(S::zero(), l)"),
    ("what lse loses by rounding", CPU + "math.h", "sum + lost, inputs", "sum, inputs"),
    ("sums of a bias that are not finite", CPU + "scores.h", "S::finite((zeros[0] + zeros[1]) + (zeros[2] + zeros[3]))", "true"),
    ("cut heads begin at the first", CPU + "schedule.h", "head = first_head + part", "head = part"),
    ("lengths are not checked", "csrc/bindings/validate.h", "if (lengths[b] < 0 || lengths[b] > limit) {", "if (lengths[b] < 0) {"),
    ("a page beyond the last", "csrc/bindings/validate.h", "row[i] < c.k.shape[0]) continue;", "row[i] <= c.k.shape[0]) continue;"),
    ("the mode of rounding is the host's", "csrc/cpu/float_mode.h", "if ((found_ & ~kFlags) != wanted) set(wanted);", ""),
    # Few rows: blocks of keys, columns apart, rows of a group, int8.
    ("blocks of keys as long as they may be", CPU + "head_lanes.h", "p, task.batch, block.first + block.n, seen.end", "p, task.batch, block.first + scratch.keys, seen.end"),
    ("no rescale of the sum of few rows", CPU + "head_lanes.h", "S::fma(scratch.l[first + i], S::set1(corrections[i]), sum)", "scratch.l[first + i] + sum"),
    ("what hides beside intervals is forgotten", CPU + "row_group.h", "hides_by_bits(p) || added_may_hide(p) ? 0 : r.length_k", "r.length_k"),
    ("intervals of few rows do not end", CPU + "row_group.h", "if (seen[i].end < all_see.end) all_see.end = seen[i].end;", ""),
    ("queries of columns apart as they lie", CPU + "row_group.h", "else order_columns(p.k.dtype, to, p.head_dim, false);", ""),
    ("results stay apart", CPU + "head_lanes.h", "order_columns(p.v.dtype, out, p.value_dim, true);", ""),
    ("odd columns before even ones", CPU + "row_group.h", "ordered[odd * W + i] = row[2 * i + odd];", "ordered[odd * W + i] = row[2 * i + 1 - odd];"),
    ("scales of int8 keys lie beside each other", CPU + "row_products.h", "of_head[j * stride]", "of_head[j]"),
    ("scales of hidden int8 values count", CPU + "head_lanes.h", "return S::select(probability == S::zero(), S::zero(), probability * scale);", "return probability * scale;"),
    ("no rescale of the output of few rows", CPU + "row_products.h", "if (corrects) acc[i][v] *= S::set1(f.correction[i]);", ""),
    ("rescales with every few keys", CPU + "row_products.h", "with_sums<R, NV>(f, d, j0 == 0,", "with_sums<R, NV>(f, d, true,"),
    ("hidden values of few rows count", CPU + "row_products.h", "if (hides && weight == 0) continue;", ""),
    ("splits of few rows over one another", CPU + "head_lanes.h", "partial + (f.first + i) * (p.value_dim + 2)", "partial + i * (p.value_dim + 2)"),
    ("columns that fill no vector are the first", CPU + "row_products.h", "[&](const char* at, Vec<T>* k) { *k = load_some<T>(storage, at, Storage::size, columns - d); }", "[&](const char* at, Vec<T>* k) { *k = load_some<T>(storage, at - d * Storage::size, Storage::size, columns - d); }"),
    # The rest of a product's rows.
    ("rows before the rest twice", CPU + "gemm.h", "if (row >= r) epilogue(row, v, x);", "epilogue(row, v, x);"),
    ("the rest is of other rows", CPU + "gemm.h", "a + last_half * step, lda", "a + r * step, lda"),
    ("the rest lacks a row", CPU + "gemm.h", "for (; r < rows; ++r) gemm_tile<E, 1, NV, M>", "for (; r + 1 < rows; ++r) gemm_tile<E, 1, NV, M>"),
]  # fmt: skip

# Of kernels for pairs of bfloat16 alone: noticed where the processor has their instruction set, which is built then.
PAIRS = [
    ("weights of pairs lack the last keys", CPU + "row_products.h", "j + W < n ? S::load(at + W) : S::zero()", "S::zero()"),
    ("values past the last key", CPU + "row_products.h", "if (both) memcpy(&other,", "memcpy(&other,"),
    ("even columns for odd ones", CPU + "row_products.h", "x[2 * v + 1] = (typename P::V)(one >> 16 | (other & 0xffff0000u));", "x[2 * v + 1] = x[2 * v];"),
    ("columns that pairs have taken again", CPU + "head_lanes.h", "add_values<E, R, false>(storage, f, block, done, ahead);", "add_values<E, R, false>(storage, f, block, 0, ahead);"),
    ("scores of pairs without their scale", CPU + "row_products.h", "kOfPairs<E> ? summed * factor : summed", "summed"),
]  # fmt: skip

# Of what a matrix unit reads in whole tiles.
TILES = [
    ("weights behind the last key", CPU + "row_lanes.h", "if (kOfTiles<E>) memset(scores + elements<E>(n) * lanes, 0,", "if (kOfTiles<E>) memset(scores + elements<E>(n) * lanes, 60,"),
    ("weights of dq behind the last key", CPU + "pair_weights.h", "memset(of_query.rounded + used * NV * W, 0,", "memset(of_query.rounded + used * NV * W, 60,"),
    ("weights behind the last row", CPU + "backward.h", "if constexpr (kOfTiles<E>) zeros_behind", "if constexpr (false) zeros_behind"),
    ("columns behind the last one of a query", CPU + "pack.h", "memset(dst + used, 0,", "memset(dst + used, 255,"),
    ("keys that are not finite behind the last one", CPU + "key_rows.h", "return kOfTiles<E> && n % kTileNumbers<E> != 0;", "return false;"),
    ("tiles that begin within a group of keys", CPU + "key_rows.h", "kOfTiles<E> ? kTileNumbers<E> : 4", "4"),
    ("rows of tiles in one another's place", CPU + "gemm_tiles.h", "U::template add<r * NV + v, kA, kB>();", "U::template add<r * NV + i, kA, kB>();"),
    ("sums of tiles that begin with those before", CPU + "gemm_tiles.h", "else U::template zero<t>();", "else if (t > 0) U::template zero<t>();"),
    ("powers beyond the normal numbers", CPU + "simd_avx512.h", "_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(-126), _CMP_NLT_UQ), y, x)", "_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(-126), _CMP_GE_OQ), y, x)"),
    ("subnormal numbers beside garbage", CPU + "gemm.h", "[[maybe_unused]] const typename MatrixUnit<E>::AsUnit as_unit;", ""),
    ("room for columns of values", CPU + "key_rows.h", "return kColumn * round_to_width<Accumulator<E>>(dim);", "return kBlockKeys / 4 * round_to_width<Accumulator<E>>(dim);"),
]  # fmt: skip

PYTHON = [
    ("windows of the composite", PACKAGE + "masks/key_range.py", "terms.append(columns >= own - window_left)", "terms.append(columns > own - window_left)"),
    ("causal of the composite", PACKAGE + "masks/key_range.py", "terms.append(columns <= own + window_right)", "terms.append(columns < own + window_right)"),
    ("padding of the composite", PACKAGE + "masks/key_range.py", "terms.append(columns < key_lengths)", "terms.append(columns <= key_lengths)"),
    ("rows of padding in the composite", PACKAGE + "masks/key_range.py", "terms.append(rows < query_lengths)", "pass"),
    ("dropout's threshold", PACKAGE + "call/philox.py", "words[..., :seqlen_k] >= uint64(limit)", "words[..., :seqlen_k] < uint64(limit)"),
    ("dropout's key", PACKAGE + "call/philox.py", "uint64((seed >> 32 ^ offset >> 32) & LOW32)", "uint64((seed >> 32) & LOW32)"),
    ("the rest of the rows", PACKAGE + "tensorflow/composite.py", "rest = step(self.count * self.rows, self.rest)", "rest = step(0, self.rest)"),
    ("scales of int8", PACKAGE + "generation/int8.py", "xp.expand_dims(scales, 3)", "xp.expand_dims(xp.ones_like(scales), 3)"),
    ("new keys that are no rows of q", PACKAGE + "generation/decode.py", 'k_new = xp.agreeing(k_new, q, axis, f"{name}: there must be as many new keys as rows of q")', "pass"),
]  # fmt: skip
