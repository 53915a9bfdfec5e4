//! Convolutions, linear layers and their gradients as products of matrices.

use super::{Arg, CONTROL, Place, Rows, Translation, input, int, output};
use crate::library::{Geometry, Kind};
use ddpm_engine::MatmulDtype;
use ddpm_engine::Shape;
use ddpm_engine::ops::{Conv2d, Conv2dTranspose, Conv2dWeightGrad, Padding};

/// k is split at multiples of this: a step of the kernels in bf16.
const STEP: usize = 32;
/// So many steps or fewer are not split: adding parts up is another launch, which takes as long as many steps. Nor are there parts
/// of fewer than the second.
const SPLIT_STEPS: usize = 24;
const LEAST_STEPS: usize = 8;
/// Most parts of k.
const MOST_PARTS: usize = 64;

/// A product's kernels: by arithmetic (f32, tf32, bf16) and tile (64, 128).
type Kernels = [[&'static str; 2]; 3];

const FORWARD: Kernels =
    [["conv_f32_64", "conv_f32_128"], ["conv_tf32_64", "conv_tf32_128"], ["conv_bf16_64", "conv_bf16_128"]];
const TRANSPOSED: Kernels = [
    ["conv_transposed_f32_64", "conv_transposed_f32_128"],
    ["conv_transposed_tf32_64", "conv_transposed_tf32_128"],
    ["conv_transposed_bf16_64", "conv_transposed_bf16_128"],
];
const WEIGHTS: Kernels = [
    ["conv_weights_f32_64", "conv_weights_f32_128"],
    ["conv_weights_tf32_64", "conv_weights_tf32_128"],
    ["conv_weights_bf16_64", "conv_weights_bf16_128"],
];

/// Of tensors that are stored in bf16.
const HALF: [&str; 2] = ["conv_half_64", "conv_half_128"];
const HALF_WEIGHTS: [&str; 2] = ["conv_half_weights_64", "conv_half_weights_128"];

/// Numbers of bf16 that are copied at once: of 16 bytes.
const CHUNK: usize = 8;

/// A convolution's sizes: images, input, output, kernel, channels.
#[derive(Clone, Copy)]
struct Sizes {
    n: usize,
    input: (usize, usize),
    output: (usize, usize),
    kernel: (usize, usize),
    cin: usize,
    cout: usize,
}

/// Images as `[n, h, w, c]`; anything else as one image with a row of pixels.
fn pixels(shape: Shape) -> [usize; 4] {
    shape.nhwc().unwrap_or([1, 1, shape.len() / shape.channels(), shape.channels()])
}

impl Sizes {
    /// Of the convolution `x` to `y` with weights `w`.
    fn new(x: Shape, w: Shape, y: Shape) -> Self {
        let ([n, h, wd, cin], [_, oh, ow, cout]) = (pixels(x), pixels(y));
        let [kh, kw, ..] = w.nhwc().expect("weights are [kh, kw, cin, cout]");
        Self { n, input: (h, wd), output: (oh, ow), kernel: (kh, kw), cin, cout }
    }

    /// As libraries take them.
    fn geometry(&self, stride: (usize, usize), pad: Padding) -> Geometry {
        let Self { n, input, output, kernel, cin, cout } = *self;
        Geometry { n, input, output, kernel, stride, pad: pad.before, cin, cout }
    }

    /// The offsets of a convolution's taps, in the kernel's order.
    fn taps(&self, pad: Padding) -> Vec<[i32; 4]> {
        let at = |k: usize, pad: usize| k as i32 - pad as i32;
        (0..self.kernel.0 * self.kernel.1)
            .map(|k| [at(k / self.kernel.1, pad.before.0), at(k % self.kernel.1, pad.before.1), k as i32, 0])
            .collect()
    }
}

/// How a product `[m, k] [k, n]` is cut up.
struct Cut {
    /// 0: tiles of 64, 1: of 128.
    tile: usize,
    parts: usize,
    part: usize,
    grid: [usize; 3],
}

impl Cut {
    fn new(m: usize, n: usize, k: usize, blocks: usize) -> Self {
        let tiles = |side: usize| m.div_ceil(side) * n.div_ceil(side);
        let large = n > 64 && m > 64 && tiles(128) >= blocks;
        let side = if large { 128 } else { 64 };
        let most = if k / STEP > SPLIT_STEPS { k / STEP / LEAST_STEPS } else { 1 };
        let wanted = blocks.div_ceil(tiles(side)).min(most).clamp(1, MOST_PARTS);
        let part = k.div_ceil(wanted).next_multiple_of(STEP).max(STEP);
        let parts = k.div_ceil(part).max(1);
        Self { tile: large.into(), parts, part, grid: [m.div_ceil(side), n.div_ceil(side), parts] }
    }
}

/// Threads of a block of the kernels for tensors in bf16.
fn half_threads(tile: usize) -> usize {
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
    /// `y, parts, .., flags` as the kernels take them.
    fn args(&self, parts: Arg<Place>) -> [Arg<Place>; 13] {
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
    /// As they are, with the kernels for them.
    Plain(&'a Kernels),
    /// As rows of bf16, which are kept, with this many taps.
    Rows(Arg<Place>, usize),
}

/// The gathered input: sizes, pixels of the output, steps.
struct Source {
    n: usize,
    size: (usize, usize),
    channels: usize,
    rows: usize,
    columns: usize,
    stride: (usize, usize),
}

impl Translation<'_> {
    pub(super) fn math(&self) -> usize {
        match self.arithmetic.factors {
            MatmulDtype::Bf16 => 2,
            _ if self.choices.tf32 => 1,
            _ => 0,
        }
    }

    /// `x, taps, n, .., tap_count` as the kernels take them.
    fn source(&mut self, source: &Source, taps: &[[i32; 4]]) -> [Arg<Place>; 11] {
        let taps_ = self.constants.push(taps);
        let Source { n, size, channels, rows, columns, stride } = *source;
        let [n, h, w, c, rows, columns, sy, sx, count] =
            [n, size.0, size.1, channels, rows, columns, stride.0, stride.1, taps.len()].map(int);
        [input(0), taps_, n, h, w, c, rows, columns, sy, sx, count]
    }

    /// The weights `[taps, c, n]`, or `[taps, n, c]` where they are `transposed`, as kernels for them and operand 0 take them.
    fn rows_of_weights<'a>(
        &mut self,
        kernels: &'a Kernels,
        taps: usize,
        c: usize,
        n: usize,
        transposed: bool,
    ) -> Weights<'a> {
        if !(self.half[0] && self.parameters[1] && c.is_multiple_of(CHUNK)) {
            return Weights::Plain(kernels);
        }
        let to = self.kept_bf16(n * taps * c);
        self.work.rows.push(Rows { from: Place::Input(1), to, taps, c, n, transposed });
        Weights::Rows(Arg::At(to), taps)
    }

    /// A product over gathered pixels. `parts` is scratch memory that several phases share.
    fn gather(&mut self, weights: &Weights<'_>, source: &Source, taps: &[[i32; 4]], target: &Target) {
        let Source { n, channels, rows, columns, .. } = *source;
        let m = n * rows * columns;
        let cut = Cut::new(m, target.channels, taps.len() * channels, self.choices.blocks);
        let scratch = if cut.parts > 1 { cut.parts * m * target.channels } else { 0 };
        self.work.scratch = self.work.scratch.max(scratch);
        let parts = Arg::At(Place::Scratch(0));
        let (source, target) = (self.source(source, taps), target.args(parts));
        let mut args = source.to_vec();
        let (kernel, threads) = match *weights {
            Weights::Plain(kernels) => {
                args.push(input(1));
                (kernels[self.math()][cut.tile], 256)
            }
            Weights::Rows(rows, all_taps) => {
                args.extend([rows, int(all_taps)]);
                (HALF[cut.tile], half_threads(cut.tile))
            }
        };
        args.extend(target);
        args.push(int(cut.part));
        self.launch_all(kernel, cut.grid, [threads, 1, 1], args);
        if cut.parts > 1 {
            let [count, m_, rows, columns] = [cut.parts, m, rows, columns].map(int);
            let mut args = vec![count, m_, rows, columns];
            args.extend(target);
            let args: [Arg<Place>; 17] = args.try_into().expect("4 + 13");
            let channels = match target[5] {
                Arg::Int(c) => c as usize,
                _ => unreachable!("channels are an int"),
            };
            self.each("conv_finish", m * channels, args);
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
        let weights = self.rows_of_weights(&FORWARD, taps.len(), s.cin, s.cout, false);
        self.gather(&weights, &source, &taps, &target);
        self.by_libraries(Kind::Forward, s.geometry(op.stride, op.pad), addends);
    }

    pub(super) fn conv_transpose(&mut self, op: &Conv2dTranspose) {
        // The convolution whose transpose this is, from the result to the operand.
        let s = Sizes::new(self.outputs[0], self.inputs[1], self.inputs[0]);
        let addends = [op.bias.then_some(2), None, None];
        let weights = self.rows_of_weights(&TRANSPOSED, s.kernel.0 * s.kernel.1, s.cout, s.cin, true);
        for y in 0..op.stride.0.min(s.input.0) {
            for x in 0..op.stride.1.min(s.input.1) {
                // Output pixels (y + i stride, x + j stride) are made of the taps that reach them.
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
        self.by_libraries(Kind::DataGrad, s.geometry(op.stride, op.pad), addends);
    }

    /// Operands `x, dy`; results `dw` and perhaps `db`.
    pub(super) fn conv_weight_grad(&mut self, op: &Conv2dWeightGrad) {
        let s = Sizes::new(self.inputs[0], op.weights, self.inputs[1]);
        let taps = s.taps(op.pad);
        let (m, k) = (taps.len() * s.cin, s.n * s.output.0 * s.output.1);
        let cut = Cut::new(m, s.cout, k, self.choices.blocks);
        let source = Source {
            n: s.n,
            size: s.input,
            channels: s.cin,
            rows: s.output.0,
            columns: s.output.1,
            stride: op.stride,
        };
        let parts = if cut.parts > 1 { self.scratch(cut.parts * m * s.cout) } else { CONTROL };
        let mut args = self.source(&source, &taps).to_vec();
        args.extend([input(1), output(0), parts, int(s.cout), int(cut.part)]);
        let chunks = s.cin.is_multiple_of(CHUNK) && s.cout.is_multiple_of(CHUNK);
        let (kernel, threads) = match self.half[0] && self.half[1] && chunks {
            true => (HALF_WEIGHTS[cut.tile], half_threads(cut.tile)),
            false => (WEIGHTS[self.math()][cut.tile], 256),
        };
        self.launch_all(kernel, cut.grid, [threads, 1, 1], args);
        if cut.parts > 1 {
            self.add_parts(parts, output(0), cut.parts, m * s.cout);
        }
        if op.bias {
            self.column_sums(input(1), output(1), 1, k, s.cout);
        }
        self.weight_grad_by_libraries(s.geometry(op.stride, op.pad), op.bias);
    }
}
