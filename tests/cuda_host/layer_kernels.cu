// Kernels that try one instruction each, for test_layer.py: right, and wrong.
#include "../../csrc/cuda/ptx.cuh"

namespace attn_ops {
namespace cuda {

struct LayerArgs {
  const void* a;
  const void* b;
  void* out;
  int64_t n;
  int32_t mode;
};

// --- Matrix products: block i multiplies a[i] (16 x k) and b[i] (k x 8), and adds out[i] (16 x 8) --------------------

using Mma = void (*)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]);

template <class Element, int k, Mma mma>
ATTN_DEVICE void product(const LayerArgs& args) {
  constexpr int kPerWord = 4 / sizeof(Element);
  const Element* left = static_cast<const Element*>(args.a) + block_index() * 16 * k;
  const Element* right = static_cast<const Element*>(args.b) + block_index() * k * 8;
  float* out = static_cast<float*>(args.out) + block_index() * 16 * 8;
  const int g = lane_index() / 4, t = lane_index() % 4;
  uint32_t a[4] = {}, b[2] = {};
  float d[4];
  for (int i = 0; i < 4; ++i) {
    const int row = g + i % 2 * 8;
    for (int e = 0; e < kPerWord; ++e) {
      const int column = kPerWord * t + e + i / 2 * 4 * kPerWord;
      a[i] |= static_cast<uint32_t>(left[row * k + column]) << 16 * e;
      if (i % 2 == 0) b[i / 2] |= static_cast<uint32_t>(right[column * 8 + g]) << 16 * e;
    }
    d[i] = out[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  }
  mma(d, a, b);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}
ATTN_KERNEL(layer_mma_f16, 32, LayerArgs) { product<uint16_t, 16, mma_f16>(args); }
ATTN_KERNEL(layer_mma_bf16, 32, LayerArgs) { product<uint16_t, 16, mma_bf16>(args); }
ATTN_KERNEL(layer_mma_tf32, 32, LayerArgs) { product<uint32_t, 8, mma_tf32>(args); }

// --- Within a warp --------------------------------------------------------------------------------------------------

// a: 32 rows of 8 elements of 16 bits. out: plain, then transposed.
ATTN_KERNEL(layer_load_matrices, 32, LayerArgs) {
  const int lane = lane_index();
  Bytes16* row = reinterpret_cast<Bytes16*>(shared_memory()) + lane;
  *row = static_cast<const Bytes16*>(args.a)[lane];
  sync_warp();
  uint32_t r[2][4];
  load_matrices(r[0], shared_address(row));
  load_matrices_transposed(r[1], shared_address(row));
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(args.out)[128 * n + 4 * lane + i] = r[n][i];
  }
}

// out: shuffle of a by b, then shuffle_xor of a by n, then whether any a of the warp is above 2.
ATTN_KERNEL(layer_shuffle, 64, LayerArgs) {
  const int i = thread_index();
  float* out = static_cast<float*>(args.out);
  const float value = static_cast<const float*>(args.a)[i];
  out[i] = shuffle(value, static_cast<const int*>(args.b)[i]);
  out[64 + i] = shuffle_xor(value, static_cast<int>(args.n));
  out[128 + i] = any_in_warp(value > 2.0f) ? 1.0f : 0.0f;
}

// --- Copies ---------------------------------------------------------------------------------------------------------

// Thread i copies a[i] and a[64 + i] if b[i], as one group each; out is what shared memory holds then.
ATTN_KERNEL(layer_copy, 64, LayerArgs) {
  const int i = thread_index();
  Bytes16* shared = reinterpret_cast<Bytes16*>(shared_memory());
  for (int n = 0; n < 2; ++n) {
    const Bytes16* source = static_cast<const Bytes16*>(args.a) + 64 * n + i;
    copy_async(shared + 64 * n + i, source, static_cast<const int*>(args.b)[i] != 0);
    if (args.mode != 3) copy_async_commit();
  }
  if (args.mode == 0 || args.mode == 3) copy_async_wait<0>();
  if (args.mode == 1) copy_async_wait<1>();
  sync_block();
  // What other threads have copied.
  for (int n = 0; n < 2; ++n) static_cast<Bytes16*>(args.out)[64 * n + 63 - i] = shared[64 * n + 63 - i];
}

// Thread i copies 8 bytes of a[8 i], and 4 bytes of a[512 + 4 i], if b[i]; out is what shared memory holds then.
ATTN_KERNEL(layer_copy_few, 64, LayerArgs) {
  const int i = thread_index();
  char* shared = shared_memory();
  const char* source = static_cast<const char*>(args.a);
  const bool exists = static_cast<const int*>(args.b)[i] != 0;
  copy_async_few<8>(shared + 8 * i, source + 8 * i, exists);
  copy_async_few<4>(shared + 512 + 4 * i, source + 512 + 4 * i, exists);
  copy_async_commit();
  if (args.mode == 0) copy_async_wait<0>();
  sync_block();
  for (int n = i; n < 768 / 4; n += 64) static_cast<uint32_t*>(args.out)[n] = reinterpret_cast<uint32_t*>(shared)[n];
}

// Lanes copy a to shared memory, whose rows are then loaded. mode 1 lacks what makes other lanes' copies visible; mode
// 2 starts the next copy to a row which others may still have to read.
ATTN_KERNEL(layer_copy_and_load, 32, LayerArgs) {
  const int lane = lane_index();
  Bytes16* shared = reinterpret_cast<Bytes16*>(shared_memory());
  const Bytes16* source = static_cast<const Bytes16*>(args.a) + lane;
  copy_async(shared + lane, source, true);
  copy_async_commit();
  copy_async_wait<0>();
  if (args.mode != 1) sync_warp();
  const Bytes16* next = shared + (lane + 1) % 32;
  if (args.mode == 2) copy_async(shared + lane, source, true);
  uint32_t r[4];
  load_matrices(r, shared_address(next));
  for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(args.out)[4 * lane + i] = r[i];
}

// --- Barriers -------------------------------------------------------------------------------------------------------

// n times: every thread adds what its neighbour 32 further on has. mode 1 lacks a barrier.
ATTN_KERNEL(layer_barriers, 128, LayerArgs) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = thread_index();
  float value = static_cast<float>(i);
  for (int64_t round = 0; round < args.n; ++round) {
    shared[i] = value;
    sync_block();
    value += shared[(i + 32) % 128];
    if (args.mode == 0) sync_block();
  }
  static_cast<float*>(args.out)[128 * block_index() + i] = value;
}

// Block i: whether any of its threads is number a[i].
ATTN_KERNEL(layer_barrier_or, 128, LayerArgs) {
  const bool any = sync_block_or(thread_index() == static_cast<const int*>(args.a)[block_index()]);
  static_cast<uint8_t*>(args.out)[128 * block_index() + thread_index()] = any;
}

// Every block takes a number; out[1 + number] is the block.
ATTN_KERNEL(layer_tickets, 32, LayerArgs) {
  uint64_t* out = static_cast<uint64_t*>(args.out);
  if (thread_index() != 0) return;
  uint64_t seen = out[0], before;
  while ((before = compare_and_swap(out, seen, seen + 1)) != seen) seen = before;
  fence_acquire_release();
  out[1 + seen] = block_index();
}

// --- Numbers --------------------------------------------------------------------------------------------------------

// mode 0: a is halves, out floats. 1, 2: a is pairs of floats, out pairs of half, bfloat16. 3: exp2_fast of floats. 4:
// round_to_tf32 of floats.
ATTN_KERNEL(layer_convert, 64, LayerArgs) {
  const float* a = static_cast<const float*>(args.a);
  for (int64_t i = thread_index(); i < args.n; i += 64) {
    if (args.mode == 0) static_cast<float*>(args.out)[i] = from_f16(static_cast<const uint16_t*>(args.a)[i]);
    if (args.mode == 1) static_cast<uint32_t*>(args.out)[i] = pack_f16(a[2 * i], a[2 * i + 1]);
    if (args.mode == 2) static_cast<uint32_t*>(args.out)[i] = pack_bf16(a[2 * i], a[2 * i + 1]);
    if (args.mode == 3) static_cast<float*>(args.out)[i] = exp2_fast(a[i]);
    if (args.mode == 4) static_cast<uint32_t*>(args.out)[i] = round_to_tf32(a[i]);
  }
}

// --- Errors ---------------------------------------------------------------------------------------------------------

ATTN_DEVICE int deep(int n, volatile const char* before) {
  volatile char frame[4096];
  frame[n % 4096] = before[0];
  return n < 1000000 ? deep(n + 1, frame) + frame[0] : 0;
}

ATTN_KERNEL(layer_errors, 64, LayerArgs) {
  const int i = thread_index();
  char* shared = shared_memory();  // of 1000 bytes
  char* out = static_cast<char*>(args.out);
  uint32_t r[4];
  switch (args.mode) {
    case 0:  // a lane leaves while its warp waits
      if (i != 5) shuffle(0.0f, 0);
      return;
    case 1:  // two kinds in one warp
      if (i < 40) sync_warp();
      else shuffle_xor(0, 1);
      return;
    case 2:  // a warp does not reach the barrier
      if (i < 32) sync_block();
      return;
    case 3:  // nor one lane of it
      if (i != 40) sync_block();
      return;
    case 4: copy_async(shared + 992, out, true); return;
    case 5: copy_async(shared + 8, out, true); return;
    case 6: copy_async(shared, out + 4, true); return;
    case 7: out[0] = static_cast<char>(*reinterpret_cast<const volatile float*>(out + 2)); return;
    case 8: load_matrices(r, shared_address(shared + 2 * i)); return;
    case 9: load_matrices(r, shared_address(out)); return;
    case 10: out[0] = out[args.n + 16]; return;  // past an allocation of n bytes
    case 11: out[args.n] = 0; return;
    case 12: shared[1000] = 0; return;
    case 13: shared[2000] = 0; return;
    case 14: out[0] = static_cast<char>(deep(0, out)); return;
    case 15: *static_cast<volatile int*>(nullptr) = 0; return;
    case 16:  // two kinds of barrier
      if (i < 32) sync_block();
      else sync_block_or(true);
      return;
    case 17: copy_async_few<8>(shared + 4, out, true); return;
    case 18: copy_async_few<4>(shared, out + 2, true); return;
    case 19: copy_async_few<8>(shared + 1000, out, true); return;
    default: out[0] = 1;
  }
}

// --- Speed: n times the same, by one warp ---------------------------------------------------------------------------

ATTN_KERNEL(layer_repeat, 32, LayerArgs) {
  float d[4] = {};
  uint32_t a[4] = {}, b[2] = {};
  for (int64_t n = 0; n < args.n; ++n) {
    switch (args.mode) {
      case 0: sync_warp(); break;
      case 1: d[0] = shuffle_xor(d[0], 1); break;
      case 2: load_matrices(a, shared_address(shared_memory() + 16 * lane_index())); break;
      case 3: mma_f16(d, a, b); break;
      case 4: mma_bf16(d, a, b); break;
      case 5: mma_tf32(d, a, b); break;
      case 6: sync_block(); break;
    }
  }
  static_cast<float*>(args.out)[lane_index()] = d[0];
}

}  // namespace cuda
}  // namespace attn_ops
