//! Convolution, its transpose (which is also its data gradient) and its weight gradient.
//!
//! Weights are `[kh, kw, cin, cout]`. With a 1x1 kernel any tensor will do as input: a linear layer is a convolution
//! whose pixels are the rows.

use super::{Operation, ReduceSpatial, SumRows, operands, winograd};
use crate::autodiff::Backward;
use crate::cpu::{Cpu, Kernel, Run};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};
use ddpm_kernels::conv::winograd::{Winograd, WinogradGrad};
use ddpm_kernels::conv::{ConvShape, Epilogue, ImplicitGemm, MatmulDtype, WeightGrad};
use rayon::prelude::*;

/// Rows and columns of zeros around an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Padding {
    /// Above and left.
    pub before: (usize, usize),
    /// Below and right.
    pub after: (usize, usize),
}

impl Padding {
    /// The same on all four sides.
    pub fn even(pad: usize) -> Self {
        Self::from((pad, pad))
    }
}

impl From<(usize, usize)> for Padding {
    /// As many rows below as above, as many columns right as left.
    fn from(pad: (usize, usize)) -> Self {
        Self { before: pad, after: pad }
    }
}

/// `y = x * w + bias + per_image_bias + residual`; operands `x, w` and then those of the flags that are set, in order.
#[derive(Clone, Debug, Default)]
pub struct Conv2d {
    /// Vertical and horizontal stride.
    pub stride: (usize, usize),
    /// Zeros around the input.
    pub pad: Padding,
    /// Adds `[cout]` to every pixel.
    pub bias: bool,
    /// Adds `[n, cout]` to every pixel of its image.
    pub per_image_bias: bool,
    /// Adds a tensor of the result's shape.
    pub residual: bool,
}

/// `y = transpose of the convolution, applied to x, + bias`; operands `x, w` and `bias` if it is set.
///
/// `w` is the convolution's: `[kh, kw, channels of y, channels of x]`.
#[derive(Clone, Debug)]
pub struct Conv2dTranspose {
    /// The convolution's stride.
    pub stride: (usize, usize),
    /// The convolution's padding.
    pub pad: Padding,
    /// The result's height and width.
    pub size: (usize, usize),
    /// The result's shape where the convolution's input was no image batch.
    pub like: Option<Shape>,
    /// Whether it is a gradient, which may be made with less exact factors than a result.
    pub gradient: bool,
    /// Adds a bias to every pixel.
    pub bias: bool,
}

/// `dw` and, if wanted, `db` of a convolution; operands `x, dy`.
#[derive(Clone, Debug)]
pub struct Conv2dWeightGrad {
    /// The weights' shape, `[kh, kw, cin, cout]`.
    pub weights: Shape,
    /// The convolution's stride.
    pub stride: (usize, usize),
    /// The convolution's padding.
    pub pad: Padding,
    /// Whether the bias gradient is made too.
    pub bias: bool,
}

/// Images as `[n, h, w, c]`; anything else as one image of `rows x 1` pixels.
fn pixels(shape: Shape) -> [usize; 4] {
    shape.nhwc().unwrap_or([1, shape.len() / shape.channels(), 1, shape.channels()])
}

/// The convolution `x -> y` with these weights.
fn geometry(x: Shape, w: Shape, stride: (usize, usize), pad: Padding) -> Result<ConvShape, String> {
    let [n, h, wd, c] = pixels(x);
    let Some([kh, kw, cin, cout]) = w.nhwc() else {
        return Err("weights must be [kh, kw, cin, cout]".to_owned());
    };
    if c != cin {
        return Err(format!("the weights take {cin} channels, the input has {c}"));
    }
    if x.nhwc().is_none() && (kh, kw, stride, pad) != (1, 1, (1, 1), Padding::default()) {
        return Err("only a 1x1 convolution takes something else than [n, h, w, c]".to_owned());
    }
    let output = |size: usize, k: usize, stride: usize, pad: usize| {
        let fits = size + pad >= k && stride > 0;
        let error = || format!("a kernel of {k} does not fit into {size} pixels with {pad} of padding");
        fits.then(|| (size + pad - k) / stride + 1).ok_or_else(error)
    };
    let (rows, columns) = (pad.before.0 + pad.after.0, pad.before.1 + pad.after.1);
    let (oh, ow) = (output(h, kh, stride.0, rows)?, output(wd, kw, stride.1, columns)?);
    let output = (oh, ow);
    // What lies behind the last row or column follows from the output's size.
    Ok(ConvShape { n, input: (h, wd), output, cin, cout, kernel: (kh, kw), stride, pad: pad.before })
}

fn geometry_of(x: TensorType, w: TensorType, stride: (usize, usize), pad: Padding) -> ConvShape {
    geometry(x.shape, w.shape, stride, pad).expect("checked when the node was added")
}

impl Conv2d {
    /// A convolution with a bias.
    pub fn new(stride: usize, pad: usize) -> Self {
        Self { stride: (stride, stride), pad: Padding::even(pad), bias: true, ..Self::default() }
    }

    /// A linear layer: 1x1, with a bias.
    pub fn linear() -> Self {
        Self::new(1, 0)
    }

    /// Places of the bias, image bias and residual among the operands.
    fn addends(&self) -> [Option<usize>; 3] {
        let mut next = 2;
        [self.bias, self.per_image_bias, self.residual].map(|there| {
            there.then(|| {
                next += 1;
                next - 1
            })
        })
    }
}

impl Operation for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [bias, per_image_bias, residual] = self.addends();
        let count = 2 + [bias, per_image_bias, residual].iter().flatten().count();
        if inputs.len() != count {
            return Err(format!("takes {count} operands, not {}", inputs.len()));
        }
        let (x, w) = (inputs[0], inputs[1]);
        let shape = geometry(x.shape, w.shape, self.stride, self.pad)?;
        let y = match x.shape.nhwc() {
            Some([n, ..]) => Shape::new(&[n, shape.output.0, shape.output.1, shape.cout]),
            None => x.shape.with_channels(shape.cout),
        };
        let n = pixels(x.shape)[0];
        for (i, expected) in
            [(bias, Shape::new(&[shape.cout])), (per_image_bias, Shape::new(&[n, shape.cout])), (residual, y)]
        {
            if let Some(i) = i
                && inputs[i].shape != expected
            {
                return Err(format!("operand {i} must be {expected}"));
            }
        }
        Ok(vec![TensorType { shape: y, dtype: x.dtype }])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let (x, w, dy, name) = (b.input(0), b.input(1), b.dy, b.name());
        let mut shares = vec![None; b.node.inputs.len()];
        let [bias, per_image_bias, residual] = self.addends();
        if let Some(i) = residual {
            shares[i] = Some(dy);
        }
        if let Some(i) = per_image_bias {
            shares[i] = Some(b.graph.add(&name, ReduceSpatial, &[dy])?);
        }
        let weights = b.graph.shape(w);
        let grad = Conv2dWeightGrad { weights, stride: self.stride, pad: self.pad, bias: bias.is_some() };
        let made = b.graph.add_all(&name, grad, &[x, dy])?;
        shares[1] = Some(made[0]);
        if let Some(i) = bias {
            shares[i] = Some(made[1]);
        }
        if b.wants(0) {
            let like = b.graph.shape(x);
            let [_, h, w_, _] = pixels(like);
            let like = like.nhwc().is_none().then_some(like);
            let op = Conv2dTranspose {
                stride: self.stride,
                pad: self.pad,
                size: (h, w_),
                like,
                gradient: true,
                bias: false,
            };
            shares[0] = Some(b.graph.add(&name, op, &[dy, w])?);
        }
        Ok(Some(shares))
    }

    fn multiply_adds(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        geometry_of(inputs[0], inputs[1], self.stride, self.pad).multiply_adds() as u64
    }

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let shape = geometry_of(inputs[0], inputs[1], self.stride, self.pad);
        match winograd::chosen(cpu, Winograd::forward(cpu.isa(), cpu.arithmetic().factors, shape)) {
            Some(conv) => winograd::product_kernel(conv, self.addends()),
            None => gather_kernel(
                cpu,
                ImplicitGemm::forward(cpu.isa(), cpu.arithmetic().factors, shape),
                self.addends(),
            ),
        }
    }
}

/// Packs the weights, then computes blocks of output pixels side by side.
fn gather_kernel(cpu: &Cpu, gather: ImplicitGemm, addends: [Option<usize>; 3]) -> Kernel {
    let (packed_len, per_thread, keep) = (gather.packed_len(), gather.scratch_len(), cpu.fixed_weights());
    let by_columns = gather.task_panels();
    let columns_len = by_columns.map_or(0, |_| gather.output_len());
    let kernel = Kernel::new(move |run: &mut Run<'_>| {
        let (columns, rest) = run.shared.split_at_mut(columns_len);
        let packed = if keep { &mut *run.kept } else { &mut rest[..packed_len] };
        if !keep || run.new_weights {
            pack(&gather, run.inputs[1], packed);
        }
        let operand = |i: Option<usize>| i.map(|i| run.inputs[i]);
        let epilogue = Epilogue {
            bias: operand(addends[0]),
            per_image_bias: operand(addends[1]),
            residual: operand(addends[2]),
        };
        let (x, packed, task, scratch) = (run.inputs[0], &*packed, gather.task_pixels(), run.scratch);
        let channels = gather.output_channels();
        if let Some(panels) = by_columns {
            let pixels = gather.output_len() / channels;
            let width = gather.columns_of(panels);
            columns.par_chunks_mut(pixels * width).enumerate().for_each(|(i, out)| {
                let panels = i * panels..gather.panel_count().min((i + 1) * panels);
                scratch.with(|memory| gather.run_panels(x, packed, epilogue, panels, out, memory));
            });
            return join_columns(columns, width, run.outputs[0], channels);
        }
        run.outputs[0].par_chunks_mut(task * channels).enumerate().for_each(|(i, out)| {
            scratch.with(|memory| gather.run(x, packed, epilogue, i * task, out, memory));
        });
    });
    let kernel = match keep {
        true => kernel.kept(packed_len).shared(columns_len),
        false => kernel.shared(packed_len + columns_len),
    };
    kernel.per_thread(per_thread)
}

/// Parts of `width` columns (the last of fewer), each of all pixels, side by side: `[pixels][channels]`.
fn join_columns(parts: &[f32], width: usize, out: &mut [f32], channels: usize) {
    let pixels = out.len() / channels;
    for (pixel, out) in out.chunks_exact_mut(channels).enumerate() {
        for (out, part) in out.chunks_mut(width).zip(parts.chunks(pixels * width)) {
            out.copy_from_slice(&part[pixel * out.len()..][..out.len()]);
        }
    }
}

/// Packs all weights, panels side by side.
fn pack(gather: &ImplicitGemm, weights: &[f32], packed: &mut [f32]) {
    let mut rest = packed;
    for phase in 0..gather.phase_count() {
        let (part, tail) = rest.split_at_mut(gather.panel_len(phase) * gather.panel_count());
        part.par_chunks_mut(gather.panel_len(phase).max(1)).enumerate().for_each(|(panel, out)| {
            gather.pack_panel(phase, panel, weights, out);
        });
        rest = tail;
    }
}

impl Conv2dTranspose {
    /// An upsampling layer with a bias, whose result has this height and width.
    pub fn new(stride: usize, pad: impl Into<Padding>, size: (usize, usize)) -> Self {
        let (stride, pad) = ((stride, stride), pad.into());
        Self { stride, pad, size, like: None, gradient: false, bias: true }
    }

    /// The convolution whose transpose this is, from the result's size.
    fn geometry(&self, x: Shape, w: Shape) -> Result<ConvShape, String> {
        let [n, h, wd, c] = pixels(x);
        let Some([_, _, cin, cout]) = w.nhwc() else {
            return Err("weights must be [kh, kw, cin, cout]".to_owned());
        };
        if c != cout {
            return Err(format!("the weights take {cout} channels, the input has {c}"));
        }
        let y = Shape::new(&[n, self.size.0, self.size.1, cin]);
        let shape = geometry(y, w, self.stride, self.pad)?;
        if shape.output != (h, wd) {
            let (oh, ow) = shape.output;
            return Err(format!(
                "the input must be {oh}x{ow} for a result of {}x{}",
                self.size.0, self.size.1
            ));
        }
        Ok(shape)
    }

    fn checked(&self, inputs: &[TensorType]) -> ConvShape {
        self.geometry(inputs[0].shape, inputs[1].shape).expect("checked when the node was added")
    }
}

impl Operation for Conv2dTranspose {
    fn name(&self) -> &'static str {
        "conv2d_transpose"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        if inputs.len() != 2 + usize::from(self.bias) {
            return Err(format!("takes {} operands, not {}", 2 + usize::from(self.bias), inputs.len()));
        }
        let shape = self.geometry(inputs[0].shape, inputs[1].shape)?;
        if self.bias && inputs[2].shape != Shape::new(&[shape.cin]) {
            return Err(format!("the bias must be [{}]", shape.cin));
        }
        let full = Shape::new(&[shape.n, self.size.0, self.size.1, shape.cin]);
        Ok(vec![TensorType { shape: self.like.unwrap_or(full), dtype: inputs[0].dtype }])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let (x, w, dy, name) = (b.input(0), b.input(1), b.dy, b.name());
        // The transpose's gradient is the convolution itself; in the weight gradient the two sides change places.
        let conv = Conv2d { stride: self.stride, pad: self.pad, ..Conv2d::default() };
        let dx = if b.wants(0) { Some(b.graph.add(&name, conv, &[dy, w])?) } else { None };
        let weights = b.graph.shape(w);
        let grad = Conv2dWeightGrad { weights, stride: self.stride, pad: self.pad, bias: false };
        let dw = b.graph.add(&name, grad, &[dy, x])?;
        let mut shares = vec![dx, Some(dw)];
        if self.bias {
            shares.push(Some(b.graph.add(&name, SumRows, &[dy])?));
        }
        Ok(Some(shares))
    }

    fn multiply_adds(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        self.checked(inputs).multiply_adds() as u64
    }

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (shape, addends) = (self.checked(inputs), [self.bias.then_some(2), None, None]);
        let factors = cpu.arithmetic().factors;
        let at_points = if self.gradient { factors } else { MatmulDtype::F32 };
        match winograd::chosen(cpu, Winograd::data_grad(cpu.isa(), at_points, shape)) {
            Some(conv) => winograd::product_kernel(conv, addends),
            None => gather_kernel(cpu, ImplicitGemm::data_grad(cpu.isa(), factors, shape), addends),
        }
    }
}

impl Operation for Conv2dWeightGrad {
    fn name(&self) -> &'static str {
        "conv2d_weight_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x, dy] = operands(inputs)?;
        let shape = geometry(x.shape, self.weights, self.stride, self.pad)?;
        let expected = [shape.n, shape.output.0, shape.output.1, shape.cout];
        if pixels(dy.shape) != expected {
            return Err(format!("the output gradient must be {}", Shape::from(expected)));
        }
        let mut outputs = vec![TensorType { shape: self.weights, dtype: x.dtype }];
        if self.bias {
            outputs.push(TensorType { shape: Shape::new(&[shape.cout]), dtype: x.dtype });
        }
        Ok(outputs)
    }

    fn multiply_adds(&self, inputs: &[TensorType], outputs: &[TensorType]) -> u64 {
        geometry_of(inputs[0], outputs[0], self.stride, self.pad).multiply_adds() as u64
    }

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], outputs: &[TensorType]) -> Kernel {
        let shape = geometry_of(inputs[0], outputs[0], self.stride, self.pad);
        if let Some(grad) = WinogradGrad::new(cpu.isa(), cpu.arithmetic().factors, shape)
            .filter(|w| cpu.arithmetic().winograd && w.is_faster(cpu.arithmetic().factors))
        {
            return winograd::grad_kernel(grad, shape.cin, shape.cout);
        }
        let grad = WeightGrad::new(cpu.isa(), cpu.arithmetic().factors, shape);
        let (shared, per_thread) = (grad.tasks() * grad.partial_len(), grad.scratch_len());
        Kernel::new(move |run: &mut Run<'_>| {
            let partials = &mut run.shared[..grad.tasks() * grad.partial_len()];
            let (x, dy, scratch) = (run.inputs[0], run.inputs[1], run.scratch);
            partials.par_chunks_mut(grad.partial_len()).enumerate().for_each(|(task, partial)| {
                scratch.with(|memory| grad.run(task, x, dy, partial, memory));
            });
            let partials = &*partials;
            let (dw, db) = run.outputs.split_first_mut().expect("a weight gradient has a result");
            dw.par_chunks_mut(grad.partial_len()).enumerate().for_each(|(range, out)| {
                grad.reduce_range(partials, range, 0, out);
            });
            if let Some(db) = db.first_mut() {
                grad.reduce_bias(partials, db);
            }
        })
        .shared(shared)
        .per_thread(per_thread)
    }
}
