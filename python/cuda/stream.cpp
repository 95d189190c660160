#include "stream.h"

#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace vlmk {

// Through what torch offers for every kind of device, so that this file needs no header and no library of CUDA.
cuda::Stream current_stream(const at::Tensor& x) {
  const auto device = x.device();
  return {device.index(), c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle()};
}

}  // namespace vlmk
