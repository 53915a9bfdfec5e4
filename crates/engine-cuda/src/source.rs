//! The kernels' sources: CUDA C++, a file a family, each compiled with `common.cu` before it.

/// A source and the kernels in it.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Its name in errors.
    pub name: &'static str,
    /// What is compiled; `common.cu` belongs before it.
    pub text: &'static str,
    /// A macro to define: which kernels of the file are wanted.
    pub define: Option<&'static str>,
    /// The kernels' names.
    pub kernels: &'static [&'static str],
}

/// What every source begins with.
pub const COMMON: &str = include_str!("kernels/common.cu");

const CONV: &str = concat!(include_str!("kernels/product.cu"), include_str!("kernels/conv.cu"));

const CONV_HALF: &str = concat!(
    include_str!("kernels/product.cu"),
    include_str!("kernels/product_half.cu"),
    include_str!("kernels/conv_half.cu")
);

const ATTENTION_WIDE: &str =
    concat!(include_str!("kernels/product_half.cu"), include_str!("kernels/attention_wide.cu"));

const ATTENTION: &str = include_str!("kernels/attention.cu");

/// The kernels for heads of one width: many registers, which take the compiler long.
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

/// The same on tensor cores.
macro_rules! attention_bf16 {
    ($width:literal) => {
        Source {
            name: concat!("attention_half.cu (", $width, ")"),
            text: include_str!("kernels/attention_half.cu"),
            define: Some(concat!("ATTENTION_BF16_", $width)),
            kernels: &[
                concat!("attention_bf16_", $width),
                concat!("attention_bf16_dq_", $width),
                concat!("attention_bf16_dkv_", $width),
            ],
        }
    };
}

/// The convolutions of an arithmetic and a tile: they take the compiler long as well.
macro_rules! conv {
    ($math:literal, $tile:literal) => {
        Source {
            name: concat!("conv.cu (", $math, ", ", $tile, ")"),
            text: CONV,
            define: Some(concat!("CONV_", $math, "_", $tile)),
            kernels: &[
                concat!("conv_", $math, "_", $tile),
                concat!("conv_transposed_", $math, "_", $tile),
                concat!("conv_weights_", $math, "_", $tile),
            ],
        }
    };
}

/// Those of tensors in bf16.
macro_rules! conv_half {
    ($tile:literal) => {
        Source {
            name: concat!("conv_half.cu (", $tile, ")"),
            text: CONV_HALF,
            define: Some(concat!("CONV_HALF_", $tile)),
            kernels: &[concat!("conv_half_", $tile), concat!("conv_half_weights_", $tile)],
        }
    };
}

/// All sources. The executor compiles those whose kernels a plan needs.
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
        name: "draws.cu",
        text: include_str!("kernels/draws.cu"),
        define: None,
        kernels: &[
            "draw_normal",
            "vector_normal",
            "draw_timestep",
            "q_sample",
            "embedding",
            "lookup",
            "lookup_grad",
        ],
    },
    Source {
        name: "sampler.cu",
        text: include_str!("kernels/sampler.cu"),
        define: None,
        kernels: &[
            "vector_mix",
            "vector_deviate",
            "vector_extrapolate",
            "vector_clip",
            "vector_clip_dynamic",
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
            "hold",
            "snapshot_states",
            "adam",
        ],
    },
    Source {
        name: "library.cu",
        text: include_str!("kernels/library.cu"),
        define: None,
        kernels: &["transpose", "product_epilogue"],
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
            "batch_norm_fixed_scale",
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
    Source { name: "conv.cu (parts)", text: CONV, define: Some("CONV_FINISH"), kernels: &["conv_finish"] },
    conv_half!(64),
    conv_half!(128),
    Source {
        name: "conv_half.cu (weights)",
        text: CONV_HALF,
        define: Some("WEIGHT_ROWS"),
        kernels: &["weight_rows"],
    },
    Source {
        name: "attention_wide.cu",
        text: ATTENTION_WIDE,
        define: None,
        kernels: &["matmul_nt", "matmul_nn", "matmul_tn", "attention_weights", "attention_weights_grad"],
    },
];

impl Source {
    /// What the compiler is given.
    pub fn whole(&self) -> String {
        let define = self.define.map(|d| format!("#define {d}\n")).unwrap_or_default();
        format!("{define}{COMMON}\n{}", self.text)
    }

    /// The source that has this kernel.
    pub fn of(kernel: &str) -> Option<&'static Self> {
        SOURCES.iter().find(|s| s.kernels.contains(&kernel))
    }
}
