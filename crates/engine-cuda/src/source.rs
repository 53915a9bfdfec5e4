//! Kernel sources: CUDA C++, one file per family, each compiled with `common.cu` in front.

/// A compilation unit and its kernels.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Name used in errors.
    pub name: &'static str,
    /// The code, without `common.cu`.
    pub text: &'static str,
    /// Macro to define; selects kernels of the file.
    pub define: Option<&'static str>,
    /// Kernel names.
    pub kernels: &'static [&'static str],
}

/// The prefix of every source.
pub const COMMON: &str = include_str!("kernels/common.cu");

const CONV: &str = concat!(include_str!("kernels/conv_common.cu"), include_str!("kernels/conv.cu"));

const CONV_STORED_BF16: &str = concat!(
    include_str!("kernels/conv_common.cu"),
    include_str!("kernels/matmul_bf16.cu"),
    include_str!("kernels/conv_bf16.cu")
);

const ATTENTION_WIDE: &str =
    concat!(include_str!("kernels/matmul_bf16.cu"), include_str!("kernels/attention_wide.cu"));

const ATTENTION: &str = include_str!("kernels/attention.cu");

/// Attention kernels for one head width. One unit per width, as their register use makes them slow to compile.
macro_rules! attention {
    ($width:literal) => {
        Source {
            name: concat!("attention.cu (", $width, ")"),
            text: ATTENTION,
            define: Some(concat!("ATTENTION_", $width)),
            kernels: &[
                concat!("attention_", $width),
                concat!("attention_dq_", $width),
                concat!("attention_dkv_", $width),
            ],
        }
    };
}

/// The tensor-core versions.
macro_rules! attention_bf16 {
    ($width:literal) => {
        Source {
            name: concat!("attention_bf16.cu (", $width, ")"),
            text: include_str!("kernels/attention_bf16.cu"),
            define: Some(concat!("ATTENTION_BF16_", $width)),
            kernels: &[
                concat!("attention_bf16_", $width),
                concat!("attention_bf16_dq_", $width),
                concat!("attention_bf16_dkv_", $width),
            ],
        }
    };
}

/// Convolution kernels for one math mode and tile size; one unit each, as they compile slowly.
macro_rules! conv {
    ($math:literal, $tile:literal) => {
        Source {
            name: concat!("conv.cu (", $math, ", ", $tile, ")"),
            text: CONV,
            define: Some(concat!("CONV_", $math, "_", $tile)),
            kernels: &[
                concat!("conv_", $math, "_", $tile),
                concat!("conv_transposed_", $math, "_", $tile),
                concat!("conv_weight_grad_", $math, "_", $tile),
            ],
        }
    };
}

/// Convolutions of tensors stored in bf16.
macro_rules! conv_stored_bf16 {
    ($tile:literal) => {
        Source {
            name: concat!("conv_bf16.cu (", $tile, ")"),
            text: CONV_STORED_BF16,
            define: Some(concat!("CONV_STORED_BF16_", $tile)),
            kernels: &[concat!("conv_stored_bf16_", $tile), concat!("conv_stored_bf16_weight_grad_", $tile)],
        }
    };
}

/// All sources. The executor compiles those that contain a plan's kernels.
pub const SOURCES: [Source; 32] = [
    Source {
        name: "pointwise.cu",
        text: include_str!("kernels/pointwise.cu"),
        define: None,
        kernels: &[
            "add",
            "multiply",
            "affine",
            "running_average",
            "fill",
            "copy",
            "add_per_channel",
            "modulate",
            "silu_forward",
            "relu_forward",
            "gelu_forward",
            "mish_forward",
            "silu_backward",
            "relu_backward",
            "gelu_backward",
            "mish_backward",
            "concat",
            "slice",
            "dropout",
        ],
    },
    Source {
        name: "random.cu",
        text: include_str!("kernels/random.cu"),
        define: None,
        kernels: &[
            "random_normal",
            "sampler_normal",
            "random_timestep",
            "q_sample",
            "sinusoidal_embedding",
            "embedding",
            "embedding_grad",
        ],
    },
    Source {
        name: "sampler.cu",
        text: include_str!("kernels/sampler.cu"),
        define: None,
        kernels: &[
            "sampler_linear_combination",
            "sampler_learned_std",
            "sampler_extrapolate",
            "sampler_clip",
            "sampler_clip_dynamic",
        ],
    },
    Source {
        name: "resample.cu",
        text: include_str!("kernels/resample.cu"),
        define: None,
        kernels: &["resample", "max_pool", "max_pool_grad"],
    },
    Source {
        name: "sums.cu",
        text: include_str!("kernels/sums.cu"),
        define: None,
        kernels: &[
            "column_sums",
            "add_parts",
            "add_pairs",
            "loss",
            "loss_grad",
            "squared_norm",
            "check_and_clip",
            "snapshot_states",
            "adam",
        ],
    },
    Source {
        name: "library.cu",
        text: include_str!("kernels/library.cu"),
        define: None,
        kernels: &["transpose", "library_epilogue"],
    },
    Source {
        name: "bound.cu",
        text: include_str!("kernels/bound.cu"),
        define: None,
        kernels: &["bound", "bound_grad"],
    },
    Source {
        name: "norm.cu",
        text: include_str!("kernels/norm.cu"),
        define: None,
        kernels: &[
            "group_norm_groups",
            "group_norm_parts",
            "group_norm_apply",
            "group_norm_grad_groups",
            "group_norm_grad_parts",
            "group_norm_grad_means",
            "group_norm_grad",
            "layer_norm",
            "layer_norm_grad",
            "layer_norm_grad_sums",
            "batch_norm_mean",
            "batch_norm_variance",
            "batch_norm_inference_scale",
            "normalise",
            "batch_norm_grad_sums",
            "batch_norm_grad",
        ],
    },
    Source {
        name: "attention.cu",
        text: ATTENTION,
        define: Some("ATTENTION_DELTA"),
        kernels: &["attention_delta"],
    },
    attention!(4),
    attention!(8),
    attention!(16),
    attention!(32),
    attention!(64),
    attention!(128),
    attention!(256),
    attention!(512),
    attention_bf16!(16),
    attention_bf16!(32),
    attention_bf16!(64),
    attention_bf16!(128),
    conv!("f32", 64),
    conv!("f32", 128),
    conv!("tf32", 64),
    conv!("tf32", 128),
    conv!("bf16", 64),
    conv!("bf16", 128),
    Source {
        name: "conv.cu (split-k)",
        text: CONV,
        define: Some("CONV_SPLIT_K_REDUCE"),
        kernels: &["conv_split_k_reduce"],
    },
    conv_stored_bf16!(64),
    conv_stored_bf16!(128),
    Source {
        name: "conv_bf16.cu (repack)",
        text: CONV_STORED_BF16,
        define: Some("REPACK_WEIGHTS"),
        kernels: &["repack_weights"],
    },
    Source {
        name: "attention_wide.cu",
        text: ATTENTION_WIDE,
        define: None,
        kernels: &["matmul_nt", "matmul_nn", "matmul_tn", "attention_weights", "attention_weights_grad"],
    },
];

impl Source {
    /// The complete text for the compiler.
    pub fn full_text(&self) -> String {
        let define = self.define.map(|d| format!("#define {d}\n")).unwrap_or_default();
        format!("{define}{COMMON}\n{}", self.text)
    }

    /// The source that contains a kernel.
    pub fn of(kernel: &str) -> Option<&'static Self> {
        SOURCES.iter().find(|s| s.kernels.contains(&kernel))
    }
}
