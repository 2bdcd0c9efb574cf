// All kernels of the device, one translation unit.

#include "attention.cuh"
#include "attention_backward.cuh"
#include "attention_tiles.cuh"
#include "elementwise.cuh"
#include "lora.cuh"
#include "norm.cuh"
#include "optimizer.cuh"
#include "segments.cuh"
