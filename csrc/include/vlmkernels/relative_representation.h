#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/types.h"

namespace vlmk {

VLMK_PER_ISA(
    // values_j = r_j / |r| of each row, r_j = (max(s_j, 0) / max s)^p; 0 in rows without a positive s.
    template <class T> void relative_representation(const T* similarities,  // [rows][k]
                                                    int64_t rows, int64_t k, double p,
                                                    acc_t<T>* values);)  // [rows][k]

}  // namespace vlmk
