//! The fused operations that the network is made of, forward and backward side by side.
