// Rows of bytes to random places of memory.
//
// An ordinary store first reads the line that it writes to, and then holds it in a cache that has better things to keep.
// A streaming store does neither; it pays where the target is larger than the caches, and where whole lines are written.

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

#if defined(__SSE2__)
void stream(char* to, const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
}
void finish() { _mm_sfence(); }  // streaming stores are ordered with nothing else
#else
void stream(char* to, const char* from, int64_t bytes) { std::memcpy(to, from, bytes); }
void finish() {}
#endif

}  // namespace

// to[rows[i]] = from[i] for rows of so many bytes. No row may come twice. Whole lines of 64 bytes are streamed if wanted.
extern "C" void scatter_rows(char* to, const char* from, const int64_t* rows, int64_t count, int64_t bytes, int64_t streaming,
                         int64_t threads) {
  const bool streams = streaming && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      char* row = to + rows[i] * bytes;
      if (streams) stream(row, from + i * bytes, bytes);
      else std::memcpy(row, from + i * bytes, bytes);
    }
    finish();
  }
}
