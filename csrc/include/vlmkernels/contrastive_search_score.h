#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/scratch.h"
#include "vlmkernels/types.h"

namespace vlmk {

constexpr int64_t kCandidates = 24;  // of a block, which reads the context once; whole tiles of products

VLMK_PER_ISA(
    // Bytes of scratch memory for `repetition`.
    template <class T> int64_t repetition_bytes(int64_t d);
    // out_v = max_j <h_v / |h_v|, c_j / |c_j|> over the tokens, norms of at least 1e-12; 0 without any. NaN is the largest.
    template <class T> void repetition(const T* hidden,                     // [count <= kCandidates][d]
                                       int64_t count, const T* context,     // [tokens][d]
                                       int64_t tokens, int64_t d, Scratch,  //
                                       acc_t<T>* out);                      // [count]
    // score_v = (1 - alpha) prob_v - alpha repetition_v + beta softmax(similarity)_v, in place of prob; the terms whose
    // pointers are null are left out. Returns the first of the largest scores, NaN last.
    template <class A> int64_t contrastive_search_score(A * prob, const A* repetition, const A* similarity,  // [k]
                                                        int64_t k, double alpha, double beta);)

}  // namespace vlmk
