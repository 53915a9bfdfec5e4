//! Convolutions, linear layers and their gradients as implicit matrix products.

use super::{Arg, CONTROL, Lowering, MemRef, input, int, output};
use crate::launch::WeightRepack;
use crate::library::{ConvPass, Geometry};
use ddpm_engine::MatmulDtype;
use ddpm_engine::Shape;
use ddpm_engine::ops::{Conv2d, Conv2dTranspose, Conv2dWeightGrad, Padding};

/// Granularity of splitting k: one step of the bf16 kernels.
const STEP: usize = 32;
/// k is not split up to this many steps: reducing the parts is another launch, which costs as much as many steps. The second is
/// the fewest steps per part.
const SPLIT_STEPS: usize = 24;
const MIN_STEPS: usize = 8;
/// Maximum number of parts of k.
const MAX_PARTS: usize = 64;

/// A product's kernels, by math mode (f32, tf32, bf16) and tile size (64, 128).
type Kernels = [[&'static str; 2]; 3];

const FORWARD: Kernels =
    [["conv_f32_64", "conv_f32_128"], ["conv_tf32_64", "conv_tf32_128"], ["conv_bf16_64", "conv_bf16_128"]];
const TRANSPOSED: Kernels = [
    ["conv_transposed_f32_64", "conv_transposed_f32_128"],
    ["conv_transposed_tf32_64", "conv_transposed_tf32_128"],
    ["conv_transposed_bf16_64", "conv_transposed_bf16_128"],
];
const WEIGHT_GRAD: Kernels = [
    ["conv_weight_grad_f32_64", "conv_weight_grad_f32_128"],
    ["conv_weight_grad_tf32_64", "conv_weight_grad_tf32_128"],
    ["conv_weight_grad_bf16_64", "conv_weight_grad_bf16_128"],
];

/// For tensors stored in bf16.
const STORED_BF16: [&str; 2] = ["conv_stored_bf16_64", "conv_stored_bf16_128"];
const STORED_BF16_WEIGHT_GRAD: [&str; 2] =
    ["conv_stored_bf16_weight_grad_64", "conv_stored_bf16_weight_grad_128"];

/// bf16 elements copied at once: 16 bytes.
const CHUNK: usize = 8;

/// Sizes of a convolution: images, input, output, kernel, channels.
#[derive(Clone, Copy)]
struct Sizes {
    n: usize,
    input: (usize, usize),
    output: (usize, usize),
    kernel: (usize, usize),
    cin: usize,
    cout: usize,
}

/// Images as `[n, h, w, c]`; anything else as one image with a single row of pixels.
fn pixels(shape: Shape) -> [usize; 4] {
    shape.nhwc().unwrap_or([1, 1, shape.len() / shape.channels(), shape.channels()])
}

impl Sizes {
    /// Sizes of the convolution of `x` to `y` with weights `w`.
    fn new(x: Shape, w: Shape, y: Shape) -> Self {
        let ([n, h, wd, cin], [_, oh, ow, cout]) = (pixels(x), pixels(y));
        let [kh, kw, ..] = w.nhwc().expect("weights are [kh, kw, cin, cout]");
        Self { n, input: (h, wd), output: (oh, ow), kernel: (kh, kw), cin, cout }
    }

    /// In the form that libraries use.
    fn geometry(&self, stride: (usize, usize), pad: Padding) -> Geometry {
        let Self { n, input, output, kernel, cin, cout } = *self;
        Geometry { n, input, output, kernel, stride, pad: pad.before, cin, cout }
    }

    /// Tap offsets, in the kernel's order.
    fn taps(&self, pad: Padding) -> Vec<[i32; 4]> {
        let at = |k: usize, pad: usize| k as i32 - pad as i32;
        (0..self.kernel.0 * self.kernel.1)
            .map(|k| [at(k / self.kernel.1, pad.before.0), at(k % self.kernel.1, pad.before.1), k as i32, 0])
            .collect()
    }
}

/// Tiling of a product `[m, k] [k, n]`.
struct Tiling {
    /// 0: tiles of 64, 1: of 128.
    tile: usize,
    parts: usize,
    part: usize,
    grid: [usize; 3],
}

impl Tiling {
    fn new(m: usize, n: usize, k: usize, blocks: usize) -> Self {
        let tiles = |side: usize| m.div_ceil(side) * n.div_ceil(side);
        let large = n > 64 && m > 64 && tiles(128) >= blocks;
        let side = if large { 128 } else { 64 };
        let max_parts = if k / STEP > SPLIT_STEPS { k / STEP / MIN_STEPS } else { 1 };
        let wanted = blocks.div_ceil(tiles(side)).min(max_parts).clamp(1, MAX_PARTS);
        let part = k.div_ceil(wanted).next_multiple_of(STEP).max(STEP);
        let parts = k.div_ceil(part).max(1);
        Self { tile: large.into(), parts, part, grid: [m.div_ceil(side), n.div_ceil(side), parts] }
    }
}

/// Threads per block of the kernels for tensors stored in bf16.
fn bf16_threads(tile: usize) -> usize {
    [128, 256][tile]
}

/// The output pixels of a product, and what is added to them.
struct Target {
    channels: usize,
    size: (usize, usize),
    first: (usize, usize),
    step: (usize, usize),
    addends: [Option<usize>; 3],
}

impl Target {
    /// `y, parts, .., flags` in the kernels' order.
    fn args(&self, parts: Arg<MemRef>) -> [Arg<MemRef>; 13] {
        let operand = |i: Option<usize>| i.map_or(CONTROL, input);
        let flags = (0..3).map(|i| usize::from(self.addends[i].is_some()) << i).sum();
        let [bias, per_image_bias, residual] = self.addends.map(operand);
        let [channels, h, w, y0, x0, dy, dx, flags] = [
            self.channels,
            self.size.0,
            self.size.1,
            self.first.0,
            self.first.1,
            self.step.0,
            self.step.1,
            flags,
        ]
        .map(int);
        [output(0), parts, bias, per_image_bias, residual, channels, h, w, y0, x0, dy, dx, flags]
    }
}

/// The weights of a product over gathered pixels.
enum Weights<'a> {
    /// In their own layout, with the kernels for it.
    Plain(&'a Kernels),
    /// Repacked into cached bf16 rows with this many taps.
    Repacked(Arg<MemRef>, usize),
}

/// The gathered input: its sizes, the output's pixels, and strides.
struct Source {
    n: usize,
    size: (usize, usize),
    channels: usize,
    rows: usize,
    columns: usize,
    stride: (usize, usize),
}

impl Lowering<'_> {
    pub(super) fn math(&self) -> usize {
        match self.compute.matmul_dtype {
            MatmulDtype::Bf16 => 2,
            _ if self.options.tf32 => 1,
            _ => 0,
        }
    }

    /// `x, taps, n, .., tap_count` in the kernels' order.
    fn source(&mut self, source: &Source, taps: &[[i32; 4]]) -> [Arg<MemRef>; 11] {
        let taps_ = self.constants.push(taps);
        let Source { n, size, channels, rows, columns, stride } = *source;
        let [n, h, w, c, rows, columns, sy, sx, count] =
            [n, size.0, size.1, channels, rows, columns, stride.0, stride.1, taps.len()].map(int);
        [input(0), taps_, n, h, w, c, rows, columns, sy, sx, count]
    }

    /// The weights `[taps, c, n]` (`[taps, n, c]` if `transposed`), repacked if operand 0 is stored in bf16.
    fn repacked_weights<'a>(
        &mut self,
        kernels: &'a Kernels,
        taps: usize,
        c: usize,
        n: usize,
        transposed: bool,
    ) -> Weights<'a> {
        if !(self.bf16[0] && self.parameters[1] && c.is_multiple_of(CHUNK)) {
            return Weights::Plain(kernels);
        }
        let to = self.cached_bf16(n * taps * c);
        self.lowered.repacks.push(WeightRepack { from: MemRef::Input(1), to, taps, c, n, transposed });
        Weights::Repacked(Arg::At(to), taps)
    }

    /// A product over gathered pixels. Phases share the scratch memory for the parts of k.
    fn gather(&mut self, weights: &Weights<'_>, source: &Source, taps: &[[i32; 4]], target: &Target) {
        let Source { n, channels, rows, columns, .. } = *source;
        let m = n * rows * columns;
        let tiling = Tiling::new(m, target.channels, taps.len() * channels, self.options.blocks);
        let scratch = if tiling.parts > 1 { tiling.parts * m * target.channels } else { 0 };
        self.lowered.scratch = self.lowered.scratch.max(scratch);
        let parts = Arg::At(MemRef::Scratch(0));
        let (source, target) = (self.source(source, taps), target.args(parts));
        let mut args = source.to_vec();
        let (kernel, threads) = match *weights {
            Weights::Plain(kernels) => {
                args.push(input(1));
                (kernels[self.math()][tiling.tile], 256)
            }
            Weights::Repacked(weights, all_taps) => {
                args.extend([weights, int(all_taps)]);
                (STORED_BF16[tiling.tile], bf16_threads(tiling.tile))
            }
        };
        args.extend(target);
        args.push(int(tiling.part));
        self.launch_all(kernel, tiling.grid, [threads, 1, 1], args);
        if tiling.parts > 1 {
            let [count, m_, rows, columns] = [tiling.parts, m, rows, columns].map(int);
            let mut args = vec![count, m_, rows, columns];
            args.extend(target);
            let args: [Arg<MemRef>; 17] = args.try_into().expect("4 + 13");
            let channels = match target[5] {
                Arg::Int(c) => c as usize,
                _ => unreachable!("channels are an int"),
            };
            self.each("conv_split_k_reduce", m * channels, args);
        }
    }

    pub(super) fn conv(&mut self, op: &Conv2d) {
        let s = Sizes::new(self.inputs[0], self.inputs[1], self.outputs[0]);
        let mut next = 2;
        let addends = [op.bias, op.per_image_bias, op.residual].map(|there| {
            next += usize::from(there);
            there.then_some(next - 1)
        });
        let source = Source {
            n: s.n,
            size: s.input,
            channels: s.cin,
            rows: s.output.0,
            columns: s.output.1,
            stride: op.stride,
        };
        let target = Target { channels: s.cout, size: s.output, first: (0, 0), step: (1, 1), addends };
        let taps = s.taps(op.pad);
        let weights = self.repacked_weights(&FORWARD, taps.len(), s.cin, s.cout, false);
        self.gather(&weights, &source, &taps, &target);
        self.conv_by_library(ConvPass::Forward, s.geometry(op.stride, op.pad), addends);
    }

    pub(super) fn conv_transpose(&mut self, op: &Conv2dTranspose) {
        // The convolution that this transposes maps the result to the operand.
        let s = Sizes::new(self.outputs[0], self.inputs[1], self.inputs[0]);
        let addends = [op.bias.then_some(2), None, None];
        let weights = self.repacked_weights(&TRANSPOSED, s.kernel.0 * s.kernel.1, s.cout, s.cin, true);
        for y in 0..op.stride.0.min(s.input.0) {
            for x in 0..op.stride.1.min(s.input.1) {
                // The taps that reach output pixels (y + i stride, x + j stride).
                let reach = |at: usize, pad: usize, k: usize, stride: usize| {
                    let from = (at + pad) as i32 - k as i32;
                    (from.rem_euclid(stride as i32) == 0).then(|| from.div_euclid(stride as i32))
                };
                let mut taps = Vec::new();
                for (ky, kx) in (0..s.kernel.0).flat_map(|ky| (0..s.kernel.1).map(move |kx| (ky, kx))) {
                    let dy = reach(y, op.pad.before.0, ky, op.stride.0);
                    let dx = reach(x, op.pad.before.1, kx, op.stride.1);
                    if let (Some(dy), Some(dx)) = (dy, dx) {
                        taps.push([dy, dx, (ky * s.kernel.1 + kx) as i32, 0]);
                    }
                }
                let source = Source {
                    n: s.n,
                    size: s.output,
                    channels: s.cout,
                    rows: (s.input.0 - y).div_ceil(op.stride.0),
                    columns: (s.input.1 - x).div_ceil(op.stride.1),
                    stride: (1, 1),
                };
                let target =
                    Target { channels: s.cin, size: s.input, first: (y, x), step: op.stride, addends };
                self.gather(&weights, &source, &taps, &target);
            }
        }
        self.conv_by_library(ConvPass::DataGrad, s.geometry(op.stride, op.pad), addends);
    }

    /// Operands `x, dy`; results `dw` and optionally `db`.
    pub(super) fn conv_weight_grad(&mut self, op: &Conv2dWeightGrad) {
        let s = Sizes::new(self.inputs[0], op.weights, self.inputs[1]);
        let taps = s.taps(op.pad);
        let (m, k) = (taps.len() * s.cin, s.n * s.output.0 * s.output.1);
        let tiling = Tiling::new(m, s.cout, k, self.options.blocks);
        let source = Source {
            n: s.n,
            size: s.input,
            channels: s.cin,
            rows: s.output.0,
            columns: s.output.1,
            stride: op.stride,
        };
        let parts = if tiling.parts > 1 { self.scratch(tiling.parts * m * s.cout) } else { CONTROL };
        let mut args = self.source(&source, &taps).to_vec();
        args.extend([input(1), output(0), parts, int(s.cout), int(tiling.part)]);
        let chunks = s.cin.is_multiple_of(CHUNK) && s.cout.is_multiple_of(CHUNK);
        let (kernel, threads) = if self.bf16[0] && self.bf16[1] && chunks {
            (STORED_BF16_WEIGHT_GRAD[tiling.tile], bf16_threads(tiling.tile))
        } else {
            (WEIGHT_GRAD[self.math()][tiling.tile], 256)
        };
        self.launch_all(kernel, tiling.grid, [threads, 1, 1], args);
        if tiling.parts > 1 {
            self.add_parts(parts, output(0), tiling.parts, m * s.cout);
        }
        if op.bias {
            self.column_sums(input(1), output(1), 1, k, s.cout);
        }
        self.weight_grad_by_library(s.geometry(op.stride, op.pad), op.bias);
    }
}
