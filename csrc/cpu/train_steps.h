// Training steps on the CPU: some of them as one program. The same for every instruction set, whose table runs it.
#pragma once

#include "../api/backend.h"

namespace mnist_ext::cpu {

BadExample train_steps(const TrainSteps<float>&, void* workspace, StepGraph*, const Launch&);
BadExample train_steps(const TrainSteps<double>&, void* workspace, StepGraph*, const Launch&);
int64_t train_steps_workspace_bytes(const TrainSteps<float>&);
int64_t train_steps_workspace_bytes(const TrainSteps<double>&);

}  // namespace mnist_ext::cpu
