//! The hottest kernels on one thread, next to the peak of the machine.
//!
//! ```text
//! cargo bench -p ddpm-kernels               all, a few minutes
//! cargo bench -p ddpm-kernels -- weight     those with "weight" in their name
//! bench/kernels.sh                          the same as a table with fractions of the peak
//! ```
//!
//! Items are floating-point operations, always those of direct convolution even where Winograd needs fewer.
//! Without `--bench`, as `cargo test` runs it, everything runs once, on tiny shapes.

use ddpm_kernels::Isa;
use ddpm_kernels::conv::{ConvShape, MatmulDtype};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use std::fmt;

mod convolution;

fn main() {
    divan::main();
}

/// Whether this is a test rather than a measurement.
fn tiny() -> bool {
    !std::env::args().any(|arg| arg == "--bench")
}

fn isa() -> Isa {
    Isa::from_env().expect("DDPM_ISA names an instruction set of this machine")
}

/// Random values between -1 and 1.
fn random(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Peak throughput of the machine, in registers only.
mod peak {
    use super::*;

    #[divan::bench]
    fn f32(bencher: Bencher<'_, '_>) {
        let (isa, rounds) = (isa(), if tiny() { 1 } else { 1 << 20 });
        let flops = ddpm_kernels::elementwise::fma_throughput(isa, rounds);
        let run = || ddpm_kernels::elementwise::fma_throughput(isa, rounds);
        bencher.counter(ItemsCount::new(flops)).bench_local(run);
    }

    #[divan::bench]
    fn bf16(bencher: Bencher<'_, '_>) {
        let (isa, rounds) = (isa(), if tiny() { 1 } else { 1 << 20 });
        // Without the instruction there is no separate peak.
        let flops = ddpm_kernels::elementwise::bf16_fma_throughput(isa, rounds).unwrap_or(0);
        let run = || ddpm_kernels::elementwise::bf16_fma_throughput(isa, rounds);
        bencher.counter(ItemsCount::new(flops)).bench_local(run);
    }
}

/// A convolution of one of the networks.
#[derive(Clone, Copy)]
struct Conv {
    name: &'static str,
    n: usize,
    size: usize,
    cin: usize,
    cout: usize,
    kernel: usize,
    stride: usize,
}

const fn conv(name: &'static str, n: usize, size: usize, cin: usize, cout: usize) -> Conv {
    Conv { name, n, size, cin, cout, kernel: 3, stride: 1 }
}

/// Where training steps of the four networks spend most time; with fewer images, which does not change the
/// speed.
const HOTTEST: [Conv; 10] = [
    conv("simple", 4, 64, 128, 128),
    conv("simple", 4, 32, 256, 256),
    conv("simple", 4, 16, 512, 512),
    Conv { kernel: 4, stride: 2, ..conv("simple", 4, 64, 128, 128) },
    conv("unet2d", 8, 32, 128, 128),
    conv("unet2d", 4, 32, 256, 128),
    conv("unet2d", 16, 16, 256, 256),
    conv("attention", 16, 28, 64, 64),
    conv("attention", 32, 7, 256, 256),
    conv("double-conv", 4, 64, 64, 64),
];

/// Linear layers before and after attention, which Winograd does not support.
const LINEAR: [Conv; 2] = [
    Conv { kernel: 1, ..conv("attention", 16, 28, 64, 192) },
    Conv { kernel: 1, ..conv("attention", 16, 28, 64, 64) },
];

impl Conv {
    fn shape(&self) -> ConvShape {
        let (n, size, cin, cout) =
            if tiny() { (1, 8, 16, 16) } else { (self.n, self.size, self.cin, self.cout) };
        ConvShape {
            n,
            input: (size, size),
            output: (size / self.stride, size / self.stride),
            cin,
            cout,
            kernel: (self.kernel, self.kernel),
            stride: (self.stride, self.stride),
            pad: ((self.kernel - 1) / 2, (self.kernel - 1) / 2),
        }
    }
}

impl fmt::Display for Conv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, n, size, cin, cout, kernel, stride } = self;
        write!(f, "{name} {n}x{size}x{size} {cin}-{cout} k{kernel}")?;
        if *stride > 1 { write!(f, " s{stride}") } else { Ok(()) }
    }
}

/// The convolution.
mod forward {
    use super::*;

    #[divan::bench(args = HOTTEST.iter().chain(&LINEAR), sample_count = 20, max_time = 1)]
    fn f32(bencher: Bencher<'_, '_>, conv: &Conv) {
        convolution::forward(bencher, conv.shape(), MatmulDtype::F32);
    }

    #[divan::bench(args = HOTTEST.iter().chain(&LINEAR), sample_count = 20, max_time = 1)]
    fn bf16(bencher: Bencher<'_, '_>, conv: &Conv) {
        convolution::forward(bencher, conv.shape(), MatmulDtype::Bf16);
    }

    #[divan::bench(args = HOTTEST, sample_count = 20, max_time = 1)]
    fn winograd(bencher: Bencher<'_, '_>, conv: &Conv) {
        convolution::winograd_forward(bencher, conv.shape(), MatmulDtype::F32);
    }

    #[divan::bench(args = HOTTEST, sample_count = 20, max_time = 1)]
    fn winograd_bf16(bencher: Bencher<'_, '_>, conv: &Conv) {
        convolution::winograd_forward(bencher, conv.shape(), MatmulDtype::Bf16);
    }
}

/// The gradient of a convolution's input.
mod data_gradient {
    use super::*;

    #[divan::bench(args = HOTTEST.iter().chain(&LINEAR), sample_count = 20, max_time = 1)]
    fn f32(bencher: Bencher<'_, '_>, conv: &Conv) {
        convolution::data_gradient(bencher, conv.shape(), MatmulDtype::F32);
    }

    #[divan::bench(args = HOTTEST.iter().chain(&LINEAR), sample_count = 20, max_time = 1)]
    fn bf16(bencher: Bencher<'_, '_>, conv: &Conv) {
        convolution::data_gradient(bencher, conv.shape(), MatmulDtype::Bf16);
    }

    #[divan::bench(args = HOTTEST, sample_count = 20, max_time = 1)]
    fn winograd(bencher: Bencher<'_, '_>, conv: &Conv) {
        convolution::winograd_data_gradient(bencher, conv.shape(), MatmulDtype::F32);
    }

    #[divan::bench(args = HOTTEST, sample_count = 20, max_time = 1)]
    fn winograd_bf16(bencher: Bencher<'_, '_>, conv: &Conv) {
        convolution::winograd_data_gradient(bencher, conv.shape(), MatmulDtype::Bf16);
    }
}

/// The gradient of a convolution's weights and bias.
mod weight_gradient {
    use super::*;

    #[divan::bench(args = HOTTEST.iter().chain(&LINEAR), sample_count = 20, max_time = 1)]
    fn f32(bencher: Bencher<'_, '_>, conv: &Conv) {
        convolution::weight_gradient(bencher, conv.shape(), MatmulDtype::F32);
    }

    #[divan::bench(args = HOTTEST.iter().chain(&LINEAR), sample_count = 20, max_time = 1)]
    fn bf16(bencher: Bencher<'_, '_>, conv: &Conv) {
        convolution::weight_gradient(bencher, conv.shape(), MatmulDtype::Bf16);
    }

    #[divan::bench(args = HOTTEST, sample_count = 20, max_time = 1)]
    fn winograd(bencher: Bencher<'_, '_>, conv: &Conv) {
        convolution::winograd_weight_gradient(bencher, conv.shape(), MatmulDtype::F32);
    }

    #[divan::bench(args = HOTTEST, sample_count = 20, max_time = 1)]
    fn winograd_bf16(bencher: Bencher<'_, '_>, conv: &Conv) {
        convolution::winograd_weight_gradient(bencher, conv.shape(), MatmulDtype::Bf16);
    }
}

/// Memory-bound elementwise kernels and the like; bytes are those read and written.
mod passes {
    use super::*;
    use ddpm_kernels::activation::{Activation, activate, activate_backward};
    use ddpm_kernels::elementwise::{AdamStep, adam, exp};
    use ddpm_kernels::norm::{Affine, NormShape, Saved, group_norm, group_norm_backward};

    /// More than the private caches of a core hold.
    fn len() -> usize {
        if tiny() { 100 } else { 1 << 20 }
    }

    fn bytes(passes: usize, len: usize) -> BytesCount {
        BytesCount::new(passes * len * size_of::<f32>())
    }

    fn norm_shape() -> NormShape {
        let pixels = if tiny() { 9 } else { 32 * 32 };
        NormShape { pixels, channels: 128, groups: 32, eps: 1e-6, silu: true }
    }

    #[divan::bench]
    fn group_norm_silu(bencher: Bencher<'_, '_>) {
        let (isa, shape) = (isa(), norm_shape());
        let (x, gamma, beta) = (random(shape.pixels * 128), random(128), random(128));
        let affine = Affine { gamma: &gamma, beta: &beta };
        let (mut y, mut stats, mut scratch) = (x.clone(), [0.0; 64], vec![0.0; shape.scratch_len()]);
        bencher.counter(bytes(4, x.len())).bench_local(|| {
            group_norm(isa, shape, &x, affine, &mut y, &mut stats, &mut scratch);
        });
    }

    #[divan::bench]
    fn group_norm_silu_gradient(bencher: Bencher<'_, '_>) {
        let (isa, shape) = (isa(), norm_shape());
        let (x, gamma, beta) = (random(shape.pixels * 128), random(128), random(128));
        let affine = Affine { gamma: &gamma, beta: &beta };
        let (mut y, mut stats, mut scratch) = (x.clone(), [0.0; 64], vec![0.0; shape.scratch_len()]);
        group_norm(isa, shape, &x, affine, &mut y, &mut stats, &mut scratch);
        let (mut dx, mut dgamma, mut dbeta) = (x.clone(), gamma.clone(), beta.clone());
        bencher.counter(bytes(5, x.len())).bench_local(|| {
            let saved = Saved { x: &x, affine, stats: &stats, dy: &y };
            group_norm_backward(isa, shape, saved, &mut dx, &mut dgamma, &mut dbeta, &mut scratch);
        });
    }

    #[divan::bench(args = ["relu", "silu", "gelu", "mish"])]
    fn activation(bencher: Bencher<'_, '_>, name: &str) {
        let (isa, act, x) = (isa(), named(name), random(len()));
        let mut y = x.clone();
        bencher.counter(bytes(2, x.len())).bench_local(|| activate(isa, act, &x, &mut y));
    }

    #[divan::bench(args = ["relu", "silu", "gelu", "mish"])]
    fn activation_gradient(bencher: Bencher<'_, '_>, name: &str) {
        let (isa, act, x) = (isa(), named(name), random(len()));
        let mut g = x.clone();
        bencher.counter(bytes(3, x.len())).bench_local(|| activate_backward(isa, act, &x, &mut g));
    }

    fn named(name: &str) -> Activation {
        let all = [Activation::Relu, Activation::Silu, Activation::Gelu, Activation::Mish];
        all.into_iter().find(|a| a.name() == name).expect("a known activation")
    }

    /// Items are exponentials.
    #[divan::bench]
    fn exponential(bencher: Bencher<'_, '_>) {
        let (isa, x) = (isa(), random(if tiny() { 100 } else { 1 << 12 }));
        let mut y = x.clone();
        bencher.counter(ItemsCount::new(x.len())).bench_local(|| exp(isa, &x, &mut y));
    }

    #[divan::bench(args = [false, true])]
    fn adam_step(bencher: Bencher<'_, '_>, average: bool) {
        let (isa, grad) = (isa(), random(len()));
        let (mut weight, mut m, mut v) = (grad.clone(), grad.clone(), vec![1.0; grad.len()]);
        let mut ema = if average { grad.clone() } else { Vec::new() };
        let step = AdamStep {
            lr: 1e-9,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            decoupled: false,
            step: 1,
            ema_decay: 0.995,
            grad_scale: 1.0,
        };
        let passes = if average { 9 } else { 7 };
        bencher
            .counter(bytes(passes, grad.len()))
            .bench_local(|| adam(isa, &step, &grad, &mut weight, &mut m, &mut v, &mut ema));
    }
}

/// Attention of one image.
mod attention {
    use super::*;
    use ddpm_kernels::attention::{Attention, Saved};

    /// Batch size assumed for the split into tasks.
    const BATCH: usize = 16;

    /// Tokens, channels and heads.
    #[derive(Clone, Copy)]
    struct Sizes(usize, usize, usize);

    impl fmt::Display for Sizes {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{} tokens {} channels {} heads", self.0, self.1, self.2)
        }
    }

    /// Those of the networks: heads of width 4, 8, 16, 32, 64, 256, 16, 32.
    const SIZES: [Sizes; 8] = [
        Sizes(784, 16, 4),
        Sizes(784, 32, 4),
        Sizes(784, 64, 4),
        Sizes(196, 128, 4),
        Sizes(49, 256, 4),
        Sizes(256, 256, 1),
        Sizes(4096, 64, 4),
        Sizes(1024, 128, 4),
    ];

    impl Sizes {
        fn tokens(self) -> usize {
            if tiny() { 10 } else { self.0 }
        }

        /// Floating-point operations of `products` dot products for each pair of tokens.
        fn flops(self, products: usize) -> ItemsCount {
            ItemsCount::new(2 * products * self.tokens() * self.tokens() * self.1)
        }
    }

    /// One forward pass, task by task, as in a large batch.
    fn forward_pass(
        attn: &Attention,
        channels: usize,
        qkv: &[f32],
        o: &mut [f32],
        lse: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (queries, heads) = (attn.task_queries(BATCH), lse.len() / (o.len() / channels));
        let tasks = o.chunks_mut(queries * channels).zip(lse.chunks_mut(queries * heads));
        for (i, (o, lse)) in tasks.enumerate() {
            attn.forward(qkv, i * queries, None, o, lse, scratch);
        }
    }

    /// Number of images: together more than the private caches of a core hold, as in a network.
    fn images(sizes: Sizes) -> usize {
        if tiny() { 2 } else { (1 << 21) / (sizes.tokens() * sizes.1) }.max(1)
    }

    fn forward_of(bencher: Bencher<'_, '_>, sizes: Sizes, dtype: MatmulDtype) {
        let (tokens, Sizes(_, channels, heads)) = (sizes.tokens(), sizes);
        let (attn, n) = (Attention::new(isa(), dtype, tokens, channels, heads), images(sizes));
        let qkv = random(n * tokens * 3 * channels);
        let (mut o, mut lse) = (vec![0.0; n * tokens * channels], vec![0.0; n * tokens * heads]);
        let mut scratch = vec![0.0; attn.scratch_len()];
        bencher.counter(sizes.flops(2 * n)).bench_local(|| {
            let images = qkv.chunks(tokens * 3 * channels).zip(o.chunks_mut(tokens * channels));
            for ((qkv, o), lse) in images.zip(lse.chunks_mut(tokens * heads)) {
                forward_pass(&attn, channels, qkv, o, lse, &mut scratch);
            }
        });
    }

    fn gradient_of(bencher: Bencher<'_, '_>, sizes: Sizes, dtype: MatmulDtype) {
        let (tokens, Sizes(_, channels, heads)) = (sizes.tokens(), sizes);
        let (attn, n) = (Attention::new(isa(), dtype, tokens, channels, heads), images(sizes));
        let qkv = random(n * tokens * 3 * channels);
        let (mut o, mut lse) = (vec![0.0; n * tokens * channels], vec![0.0; n * tokens * heads]);
        let mut scratch = vec![0.0; attn.scratch_len().max(attn.backward_scratch_len())];
        let (d_o, mut dqkv) = (random(o.len()), qkv.clone());
        let part = |image: usize, len: usize| image * tokens * len..(image + 1) * tokens * len;
        for i in 0..n {
            let (o, lse) = (&mut o[part(i, channels)], &mut lse[part(i, heads)]);
            forward_pass(&attn, channels, &qkv[part(i, 3 * channels)], o, lse, &mut scratch);
        }
        bencher.counter(sizes.flops(5 * n)).bench_local(|| {
            for i in 0..n {
                let (o, lse, d_o) = (&o[part(i, channels)], &lse[part(i, heads)], &d_o[part(i, channels)]);
                let saved = Saved { qkv: &qkv[part(i, 3 * channels)], o, lse, d_o, dropout: None };
                attn.backward(&saved, &mut dqkv[part(i, 3 * channels)], &mut scratch);
            }
        });
    }

    mod forward {
        use super::*;

        #[divan::bench(args = SIZES, sample_count = 20, max_time = 1)]
        fn f32(bencher: Bencher<'_, '_>, sizes: Sizes) {
            forward_of(bencher, sizes, MatmulDtype::F32);
        }

        #[divan::bench(args = SIZES, sample_count = 20, max_time = 1)]
        fn bf16(bencher: Bencher<'_, '_>, sizes: Sizes) {
            forward_of(bencher, sizes, MatmulDtype::Bf16);
        }
    }

    mod gradient {
        use super::*;

        #[divan::bench(args = SIZES, sample_count = 20, max_time = 1)]
        fn f32(bencher: Bencher<'_, '_>, sizes: Sizes) {
            gradient_of(bencher, sizes, MatmulDtype::F32);
        }

        #[divan::bench(args = SIZES, sample_count = 20, max_time = 1)]
        fn bf16(bencher: Bencher<'_, '_>, sizes: Sizes) {
            gradient_of(bencher, sizes, MatmulDtype::Bf16);
        }
    }
}
