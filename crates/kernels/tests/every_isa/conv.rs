//! Convolution, data gradient and weight gradient.

use crate::{Rng, Within, bits, magnitudes, nans, unwritten, wide};
use ddpm_kernels::Isa;
use ddpm_kernels::bf16;
use ddpm_kernels::conv::{ConvShape, Epilogue, ImplicitGemm, MatmulDtype, Operands, WeightGrad};
use ddpm_kernels::reference;

/// A product of length K is summed in one chain of fused multiply-adds for each block of K, so its error is
/// at most K / 2 units of `sum |a| |b|` and, as errors have both signs, about sqrt(K) / 2 units of a much
/// smaller value in practice; a missing tap or channel makes an error of 1e4 units or more.
const PRODUCT: f64 = 4.0;

const CHANNELS: [usize; 12] = [1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 40, 64];

/// A convolution with the largest output that its padding allows.
pub fn shape(
    n: usize,
    input: (usize, usize),
    kernel: (usize, usize),
    stride: (usize, usize),
    pad: (usize, usize),
    (cin, cout): (usize, usize),
) -> ConvShape {
    let size =
        |input: usize, kernel: usize, stride: usize, pad: usize| (input + 2 * pad - kernel) / stride + 1;
    let output = (size(input.0, kernel.0, stride.0, pad.0), size(input.1, kernel.1, stride.1, pad.1));
    ConvShape { n, input, output, cin, cout, kernel, stride, pad }
}

/// Kernels, strides, paddings and image sizes, with the reason for each.
fn geometries(channels: (usize, usize)) -> Vec<ConvShape> {
    let c = channels;
    let mut all = vec![
        shape(1, (1, 1), (1, 1), (1, 1), (0, 0), c),
        shape(2, (5, 7), (1, 1), (1, 1), (0, 0), c),
        shape(1, (1, 1), (3, 3), (1, 1), (1, 1), c), // only the middle tap is inside
        shape(2, (5, 7), (3, 3), (1, 1), (1, 1), c),
        shape(3, (2, 3), (3, 3), (1, 1), (2, 2), c), // output larger than input
        shape(2, (8, 6), (3, 3), (2, 2), (1, 1), c), // the U-Net's downsampling: phases of 1, 2, 2 and 4 taps
        shape(1, (7, 9), (3, 3), (2, 2), (1, 1), c),
        shape(1, (9, 6), (3, 3), (2, 2), (0, 0), c), // the last input column is never read
        shape(2, (8, 8), (4, 4), (2, 2), (1, 1), c), // its transpose is the U-Net's upsampling
        shape(1, (7, 10), (4, 4), (2, 2), (1, 1), c),
        shape(1, (6, 5), (4, 4), (1, 1), (1, 2), c),
        shape(1, (9, 5), (5, 3), (2, 1), (2, 1), c),
        shape(2, (6, 5), (5, 3), (1, 1), (2, 1), c),
        shape(1, (6, 7), (3, 3), (2, 1), (0, 2), c),
        shape(2, (5, 7), (1, 1), (2, 2), (0, 0), c), // three of four phases have no tap
        shape(1, (4, 6), (2, 2), (2, 2), (0, 0), c),
        shape(1, (8, 7), (3, 3), (3, 3), (1, 1), c),
    ];
    // Padding below and to the right only.
    let mut uneven = shape(1, (8, 6), (3, 3), (2, 2), (0, 0), c);
    uneven.output = (4, 3);
    all.push(uneven);
    all
}

/// The inputs of one test case; also evaluates the oracle on them and on their absolute values.
pub struct Case {
    pub shape: ConvShape,
    pub dtype: MatmulDtype,
    pub x: Vec<f32>,
    pub w: Vec<f32>,
    pub dy: Vec<f32>,
    pub bias: Option<Vec<f32>>,
    pub per_image_bias: Option<Vec<f32>>,
    pub residual: Option<Vec<f32>>,
    pub input_bias: Option<Vec<f32>>,
}

impl Case {
    /// `addends`: bit 0 bias, bit 1 image bias, bit 2 residual.
    pub fn new(rng: &mut Rng, shape: ConvShape, addends: usize) -> Self {
        let ConvShape { n, input, output, cin, cout, .. } = shape;
        let out_len = n * output.0 * output.1 * cout;
        let mut when = |bit: usize, len: usize| (addends >> bit & 1 == 1).then(|| rng.vec(len));
        let (bias, per_image_bias, residual) = (when(0, cout), when(1, n * cout), when(2, out_len));
        let input_bias = when(0, cin);
        let (x, w) = (rng.vec(n * input.0 * input.1 * cin), rng.vec(shape.weights()));
        Self {
            shape,
            dtype: MatmulDtype::F32,
            x,
            w,
            dy: rng.vec(out_len),
            bias,
            per_image_bias,
            residual,
            input_bias,
        }
    }

    /// The same with bf16 operands: values that are exact in bf16, so that the oracle's operands are the same
    /// and only the sums differ.
    pub fn in_bf16(&self) -> Self {
        let rounded = |x: &[f32]| x.iter().map(|&x| bf16::widen(bf16::round(x))).collect();
        Self {
            shape: self.shape,
            dtype: MatmulDtype::Bf16,
            x: rounded(&self.x),
            w: rounded(&self.w),
            dy: rounded(&self.dy),
            bias: self.bias.clone(),
            per_image_bias: self.per_image_bias.clone(),
            residual: self.residual.clone(),
            input_bias: self.input_bias.clone(),
        }
    }

    pub fn forward(&self, to: impl Fn(&[f32]) -> Vec<f64>) -> Vec<f64> {
        let [b, p, r] = [&self.bias, &self.per_image_bias, &self.residual].map(|v| v.as_ref().map(|v| to(v)));
        let (b, p, r) = (b.as_deref(), p.as_deref(), r.as_deref());
        reference::conv2d(self.shape, &to(&self.x), &to(&self.w), b, p, r)
    }

    pub fn data_grad(&self, to: impl Fn(&[f32]) -> Vec<f64>) -> Vec<f64> {
        let bias = self.input_bias.as_ref().map(|b| to(b));
        reference::conv2d_data_grad(self.shape, &to(&self.dy), &to(&self.w), bias.as_deref())
    }

    pub fn weight_grad(&self, to: impl Fn(&[f32]) -> Vec<f64>) -> Vec<f64> {
        let (mut dw, db) = reference::conv2d_weight_grad(self.shape, &to(&self.x), &to(&self.dy));
        dw.extend(db);
        dw
    }

    pub fn epilogue(&self) -> Epilogue<'_> {
        Epilogue {
            bias: self.bias.as_deref(),
            per_image_bias: self.per_image_bias.as_deref(),
            residual: self.residual.as_deref(),
        }
    }

    pub fn run_forward(&self, isa: Isa, part: usize) -> Vec<f32> {
        run_pixels(
            &ImplicitGemm::forward(isa, self.dtype, self.shape),
            &self.x,
            &self.w,
            self.epilogue(),
            part,
        )
    }

    fn run_data_grad(&self, isa: Isa, part: usize) -> Vec<f32> {
        let epilogue = Epilogue { bias: self.input_bias.as_deref(), ..Epilogue::default() };
        run_pixels(&ImplicitGemm::data_grad(isa, self.dtype, self.shape), &self.dy, &self.w, epilogue, part)
    }

    /// `dw`, then `db`.
    fn run_weight_grad(&self, isa: Isa) -> Vec<f32> {
        let grad = WeightGrad::new(isa, self.dtype, self.shape);
        let mut partials = unwritten(grad.tasks() * grad.partial_len());
        for (task, partial) in partials.chunks_exact_mut(grad.partial_len()).enumerate() {
            grad.run(task, &self.x, &self.dy, partial, &mut unwritten(grad.scratch_len()));
        }
        let (mut dw, mut db) = (unwritten(self.shape.weights()), unwritten(self.shape.cout));
        grad.reduce(&partials, &mut dw, Some(&mut db));
        dw.extend(db);
        dw
    }
}

/// Runs a convolution in tasks of `part` pixels.
fn run_pixels(conv: &ImplicitGemm, x: &[f32], w: &[f32], epilogue: Epilogue<'_>, part: usize) -> Vec<f32> {
    let mut packed = unwritten(conv.packed_len());
    conv.pack(w, &mut packed);
    let mut out = unwritten(conv.output_len());
    for (i, out) in out.chunks_mut(part * conv.output_channels()).enumerate() {
        let operands = Operands { input: x, packed: &packed, epilogue };
        conv.run(operands, i * part, out, &mut unwritten(conv.scratch_len()));
    }
    out
}

/// Runs a convolution in tasks of `panels` panels of columns.
fn run_columns(conv: &ImplicitGemm, x: &[f32], w: &[f32], epilogue: Epilogue<'_>, panels: usize) -> Vec<f32> {
    let mut packed = unwritten(conv.packed_len());
    conv.pack(w, &mut packed);
    let (mut out, channels) = (unwritten(conv.output_len()), conv.output_channels());
    for first in (0..conv.panel_count()).step_by(panels) {
        let task = first..conv.panel_count().min(first + panels);
        let columns = conv.columns_of(first)..channels.min(conv.columns_of(task.end));
        let mut part = unwritten(conv.output_len() / channels * columns.len());
        let operands = Operands { input: x, packed: &packed, epilogue };
        conv.run_panels(operands, task, &mut part, &mut unwritten(conv.scratch_len()));
        for (out, part) in out.chunks_exact_mut(channels).zip(part.chunks_exact(columns.len())) {
            out[columns.clone()].copy_from_slice(part);
        }
    }
    out
}

pub const ALL_PIXELS: usize = usize::MAX >> 32;

/// All three passes of all cases against the oracle, on every instruction set.
fn check(name: &'static str, cases: impl IntoIterator<Item = Case>) {
    let mut within = Within::new(name, PRODUCT);
    for case in cases.into_iter().flat_map(|case| [case.in_bf16(), case]) {
        let [y, dx, dw] = [case.forward(wide), case.data_grad(wide), case.weight_grad(wide)];
        let [y_mag, dx_mag, dw_mag] =
            [case.forward(magnitudes), case.data_grad(magnitudes), case.weight_grad(magnitudes)];
        for isa in Isa::all() {
            let what = |pass: &'static str| (pass, case.dtype, case.shape);
            within.check(isa, &what("forward"), &case.run_forward(isa, ALL_PIXELS), &y, &y_mag);
            within.check(isa, &what("data gradient"), &case.run_data_grad(isa, ALL_PIXELS), &dx, &dx_mag);
            within.check(isa, &what("weight gradient"), &case.run_weight_grad(isa), &dw, &dw_mag);
        }
    }
}

#[test]
fn every_geometry_agrees_with_the_oracle() {
    let mut rng = Rng::new(1);
    let count = geometries((1, 1)).len();
    let mut cases = Vec::new();
    for g in 0..count {
        for (i, &cin) in CHANNELS.iter().enumerate() {
            // Each geometry is combined with every number of input and of output channels.
            let cout = CHANNELS[(5 * i + g) % CHANNELS.len()];
            cases.push(Case::new(&mut rng, geometries((cin, cout))[g], (g + i) % 8));
        }
    }
    check("convolution, geometries", cases);
}

#[test]
fn every_pair_of_channel_counts_agrees_with_the_oracle() {
    let mut rng = Rng::new(2);
    let pairs = CHANNELS.iter().flat_map(|&cin| CHANNELS.map(|cout| (cin, cout)));
    let cases = pairs
        .map(|c| Case::new(&mut rng, shape(1, (4, 5), (3, 3), (1, 1), (1, 1), c), 7))
        .collect::<Vec<_>>();
    check("convolution, channels", cases);
}

#[test]
fn every_pixel_count_around_a_block_agrees_with_the_oracle() {
    // Around the rows of a tile (4 to 16), the block of gathered pixels (192) and a weight-gradient pass (256), whose
    // groups of pixels are uneven from 2049 on.
    let pixels = [
        1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 23, 24, 25, 31, 32, 33, 95, 96, 97, 191, 192, 193,
        255, 256, 257, 383, 384, 385, 511, 512, 513, 2047, 2048, 2049, 2303, 2305,
    ];
    let mut rng = Rng::new(3);
    let mut cases = Vec::new();
    for p in pixels {
        cases.push(Case::new(&mut rng, shape(1, (1, p), (1, 1), (1, 1), (0, 0), (5, 17)), 1));
        cases.push(Case::new(&mut rng, shape(1, (p, 1), (3, 1), (1, 1), (1, 0), (6, 3)), 4));
    }
    // Blocks that end within an image, and phases with full blocks.
    cases.push(Case::new(&mut rng, shape(3, (9, 11), (3, 3), (1, 1), (1, 1), (4, 9)), 7));
    cases.push(Case::new(&mut rng, shape(2, (30, 31), (4, 4), (2, 2), (1, 1), (3, 5)), 7));
    check("convolution, pixels", cases);
}

#[test]
fn every_k_around_a_block_agrees_with_the_oracle() {
    // Around the run of K that is copied at once (16) and the longest block of K (288).
    let lengths = [
        1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 271, 272, 273, 287, 288, 289, 303, 304, 305, 575, 576, 577,
        592, 593, 864, 865,
    ];
    let mut rng = Rng::new(4);
    let mut cases = Vec::new();
    for k in lengths {
        cases.push(Case::new(&mut rng, shape(1, (3, 7), (1, 1), (1, 1), (0, 0), (k, 9)), 1)); // forward
        cases.push(Case::new(&mut rng, shape(1, (3, 7), (1, 1), (1, 1), (0, 0), (9, k)), 1)); // data gradient
    }
    for c in [31, 32, 33, 63, 64, 65] {
        cases.push(Case::new(&mut rng, shape(1, (4, 3), (3, 3), (1, 1), (1, 1), (c, 5)), 1));
        cases.push(Case::new(&mut rng, shape(1, (4, 3), (3, 3), (1, 1), (1, 1), (5, c)), 1));
    }
    check("convolution, lengths", cases);
}

#[test]
fn a_weight_gradient_in_several_ranges_of_rows_agrees_with_the_oracle() {
    let mut rng = Rng::new(5);
    let mut cases = Vec::new();
    for (n, input, c) in [(1, (5, 4), (130, 127)), (2, (4, 4), (257, 130)), (3, (12, 9), (96, 128))] {
        let shape = shape(n, input, (3, 3), (1, 1), (1, 1), c);
        assert!((9 * c.0 + 1) * c.1 > 96 << 10, "small enough for one range");
        cases.push(Case::new(&mut rng, shape, 0));
    }
    check("convolution, ranges", cases);
}

#[test]
fn splitting_into_tasks_is_bit_exact() {
    let mut rng = Rng::new(6);
    for (i, c) in [(3, 8), (16, 16), (17, 33), (40, 7), (64, 31)].into_iter().enumerate() {
        let mut shapes = geometries(c);
        shapes.push(shape(2, (15, 14), (3, 3), (1, 1), (1, 1), c)); // more than a block of pixels
        for shape in shapes {
            let mut case = Case::new(&mut rng, shape, 7);
            if i % 2 == 1 {
                case = case.in_bf16();
            }
            for isa in Isa::all() {
                let (y, dx) =
                    (bits(&case.run_forward(isa, ALL_PIXELS)), bits(&case.run_data_grad(isa, ALL_PIXELS)));
                for part in [1, 5 + i, 48, 193] {
                    assert_eq!(bits(&case.run_forward(isa, part)), y, "{isa}, {part} of {shape:?}");
                    assert_eq!(bits(&case.run_data_grad(isa, part)), dx, "{isa}, {part} of {shape:?}");
                }
                for panels in [1, 2] {
                    let forward = ImplicitGemm::forward(isa, case.dtype, shape);
                    let of_panels = run_columns(&forward, &case.x, &case.w, case.epilogue(), panels);
                    assert_eq!(bits(&of_panels), y, "{isa}, {panels} panels of {shape:?}");
                    let data_grad = ImplicitGemm::data_grad(isa, case.dtype, shape);
                    let epilogue = Epilogue { bias: case.input_bias.as_deref(), ..Epilogue::default() };
                    let of_panels = run_columns(&data_grad, &case.dy, &case.w, epilogue, panels);
                    assert_eq!(bits(&of_panels), dx, "{isa}, {panels} panels of {shape:?}");
                }
            }
        }
    }
}

#[test]
fn tasks_are_of_the_advertised_size_and_cover_the_output() {
    let mut rng = Rng::new(7);
    for shape in geometries((8, 16)) {
        let case = Case::new(&mut rng, shape, 1);
        for isa in Isa::all() {
            let task = ImplicitGemm::forward(isa, MatmulDtype::F32, shape).task_pixels();
            assert!(task > 0);
            assert_eq!(bits(&case.run_forward(isa, task)), bits(&case.run_forward(isa, ALL_PIXELS)));
        }
    }
}

#[test]
fn tasks_are_split_by_columns_for_few_pixels_and_many_weights() {
    let mut rng = Rng::new(8);
    for isa in Isa::all() {
        let tasks = |pixels: usize, cout: usize| {
            ImplicitGemm::forward(
                isa,
                MatmulDtype::F32,
                shape(1, (1, pixels), (1, 1), (1, 1), (0, 0), (16, cout)),
            )
        };
        assert_eq!(tasks(193, 640).task_panels(), None, "{isa}: many pixels");
        assert_eq!(tasks(16, 64).task_panels(), None, "{isa}: few columns");
        let few = shape(2, (4, 4), (3, 3), (1, 1), (1, 1), (40, 200));
        let case = Case::new(&mut rng, few, 7);
        let conv = ImplicitGemm::forward(isa, MatmulDtype::F32, few);
        let panels = conv.task_panels().expect("few pixels, many columns");
        assert!(conv.columns_of(panels) >= 64);
        let of_panels = run_columns(&conv, &case.x, &case.w, case.epilogue(), panels);
        assert_eq!(bits(&of_panels), bits(&case.run_forward(isa, ALL_PIXELS)), "{isa}");
    }
}

#[test]
fn nan_propagates_exactly_to_dependents() {
    let mut rng = Rng::new(8);
    for c in [(3, 5), (16, 16), (33, 17)] {
        for shape in geometries(c) {
            let mut in_x = Case::new(&mut rng, shape, 7);
            let at = rng.below(in_x.x.len());
            in_x.x[at] = f32::NAN;
            let mut in_dy = Case::new(&mut rng, shape, 7);
            let at = rng.below(in_dy.dy.len());
            in_dy.dy[at] = f32::NAN;
            let mut in_w = Case::new(&mut rng, shape, 7);
            let at = rng.below(in_w.w.len());
            in_w.w[at] = f32::NAN;
            for isa in Isa::all() {
                let same = |got: Vec<f32>, want: Vec<f64>, what: &str| {
                    assert_eq!(nans(wide(&got)), nans(want), "{what} on {isa}, {shape:?}");
                };
                same(in_x.run_forward(isa, ALL_PIXELS), in_x.forward(wide), "forward, x");
                same(in_x.run_weight_grad(isa), in_x.weight_grad(wide), "weight gradient, x");
                same(in_dy.run_data_grad(isa, ALL_PIXELS), in_dy.data_grad(wide), "data gradient, dy");
                // A NaN weight is also multiplied by the zeros of the padding, which the oracle skips.
                let covers = |got: Vec<f32>, want: Vec<f64>, what: &str| {
                    let missed = got.iter().zip(&want).filter(|(g, w)| w.is_nan() && !g.is_nan()).count();
                    assert_eq!(missed, 0, "{what} on {isa}, {shape:?}");
                };
                covers(in_w.run_forward(isa, ALL_PIXELS), in_w.forward(wide), "forward, w");
                covers(in_w.run_data_grad(isa, ALL_PIXELS), in_w.data_grad(wide), "data gradient, w");
                covers(in_dy.run_weight_grad(isa), in_dy.weight_grad(wide), "weight gradient, dy");
            }
        }
    }
}
