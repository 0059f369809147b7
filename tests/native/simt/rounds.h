// Several rounds: at the targets of a GPU, tensors that the emulation can afford leave a thread one round of vectors.
#pragma once

#include "../backend.h"
#include "../check.h"

namespace fused_resnet::native_test {

// From now on tensors are cut into few blocks, for which the tests have shapes; `backend` notes what it launches.
void use_few_blocks(Backend& backend);

// Whether every pass has walked several rounds of vectors, and had many chunks to merge.
void check_rounds(Report& report, const Backend& backend);

}  // namespace fused_resnet::native_test
