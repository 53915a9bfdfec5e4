//! Convolution, its transpose (which is also its data gradient) and its weight gradient.
//!
//! Weights are `[kh, kw, cin, cout]`. With a 1x1 kernel the input may be any tensor: a linear layer is a convolution
//! whose pixels are the rows.

use super::{Operation, ReduceSpatial, SumRows, operands, winograd};
use crate::autodiff::Backward;
use crate::cpu::{CpuContext, Kernel, KernelArgs};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};
use ddpm_kernels::conv::winograd::{Winograd, WinogradGrad};
use ddpm_kernels::conv::{ConvShape, Epilogue, ImplicitGemm, MatmulDtype, Operands, WeightGrad};
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
    /// The same padding on all four sides.
    pub fn even(pad: usize) -> Self {
        Self::from((pad, pad))
    }
}

impl From<(usize, usize)> for Padding {
    /// Symmetric (vertical, horizontal) padding.
    fn from(pad: (usize, usize)) -> Self {
        Self { before: pad, after: pad }
    }
}

/// `y = x * w + bias + per_image_bias + residual`; operands `x, w`, then those of the flags that are set, in order.
#[derive(Clone, Debug, Default)]
pub struct Conv2d {
    /// Vertical and horizontal stride.
    pub stride: (usize, usize),
    /// Zeros around the input.
    pub pad: Padding,
    /// Adds `[cout]` to every pixel.
    pub bias: bool,
    /// Adds `[n, cout]` to every pixel, a row per image.
    pub per_image_bias: bool,
    /// Adds a tensor of the output's shape.
    pub residual: bool,
}

/// `y = x * w^T + bias`, the transpose of a convolution; operands `x, w`, and `bias` if it is set.
///
/// `w` is the convolution's: `[kh, kw, channels of y, channels of x]`.
#[derive(Clone, Debug)]
pub struct Conv2dTranspose {
    /// The convolution's stride.
    pub stride: (usize, usize),
    /// The convolution's padding.
    pub pad: Padding,
    /// The output's height and width.
    pub size: (usize, usize),
    /// The output's shape, if the convolution's input was not an image batch.
    pub like: Option<Shape>,
    /// Whether it computes a gradient, which tolerates less precise operands than a forward pass.
    pub gradient: bool,
    /// Adds a bias to every pixel.
    pub bias: bool,
}

/// `dw` and, with `bias`, `db` of a convolution; operands `x, dy`.
#[derive(Clone, Debug)]
pub struct Conv2dWeightGrad {
    /// The weights' shape, `[kh, kw, cin, cout]`.
    pub weights: Shape,
    /// The convolution's stride.
    pub stride: (usize, usize),
    /// The convolution's padding.
    pub pad: Padding,
    /// Whether to compute the bias gradient too.
    pub bias: bool,
}

/// `[n, h, w, c]` of an image batch; other tensors are one image of `rows x 1` pixels.
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
        return Err(format!("the weights expect {cin} channels, the input has {c}"));
    }
    if x.nhwc().is_none() && (kh, kw, stride, pad) != (1, 1, (1, 1), Padding::default()) {
        return Err("only a 1x1 convolution accepts an input other than [n, h, w, c]".to_owned());
    }
    let output = |size: usize, k: usize, stride: usize, pad: usize| {
        let fits = size + pad >= k && stride > 0;
        let error = || format!("a kernel of size {k} does not fit into {size} pixels with padding {pad}");
        fits.then(|| (size + pad - k) / stride + 1).ok_or_else(error)
    };
    let (rows, columns) = (pad.before.0 + pad.after.0, pad.before.1 + pad.after.1);
    let (oh, ow) = (output(h, kh, stride.0, rows)?, output(wd, kw, stride.1, columns)?);
    let output = (oh, ow);
    // The padding after the last row and column follows from the output's size.
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

    /// Indices of the bias, per-image bias and residual among the operands.
    fn addends(&self) -> [Option<usize>; 3] {
        let mut next = 2;
        [self.bias, self.per_image_bias, self.residual].map(|present| {
            present.then(|| {
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
            return Err(format!("expected {count} operands, got {}", inputs.len()));
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
        let mut grads = vec![None; b.node.inputs.len()];
        let [bias, per_image_bias, residual] = self.addends();
        if let Some(i) = residual {
            grads[i] = Some(dy);
        }
        if let Some(i) = per_image_bias {
            grads[i] = Some(b.graph.add(&name, ReduceSpatial, &[dy])?);
        }
        let weights = b.graph.shape(w);
        let grad = Conv2dWeightGrad { weights, stride: self.stride, pad: self.pad, bias: bias.is_some() };
        let weight_grads = b.graph.add_all(&name, grad, &[x, dy])?;
        grads[1] = Some(weight_grads[0]);
        if let Some(i) = bias {
            grads[i] = Some(weight_grads[1]);
        }
        if b.needs_grad(0) {
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
            grads[0] = Some(b.graph.add(&name, op, &[dy, w])?);
        }
        Ok(Some(grads))
    }

    fn multiply_adds(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        geometry_of(inputs[0], inputs[1], self.stride, self.pad).multiply_adds() as u64
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let shape = geometry_of(inputs[0], inputs[1], self.stride, self.pad);
        match winograd::chosen(ctx, Winograd::forward(ctx.isa(), ctx.compute().matmul_dtype, shape)) {
            Some(conv) => winograd::conv_kernel(conv, self.addends()),
            None => implicit_gemm_kernel(
                ctx,
                ImplicitGemm::forward(ctx.isa(), ctx.compute().matmul_dtype, shape),
                self.addends(),
            ),
        }
    }
}

/// Packs the weights, then computes blocks of output pixels in parallel.
fn implicit_gemm_kernel(ctx: &CpuContext, gemm: ImplicitGemm, addends: [Option<usize>; 3]) -> Kernel {
    let (packed_len, per_thread, cached) = (gemm.packed_len(), gemm.scratch_len(), ctx.fixed_weights());
    let by_columns = gemm.task_panels();
    let columns_len = by_columns.map_or(0, |_| gemm.output_len());
    let kernel = Kernel::new(move |args: &mut KernelArgs<'_>| {
        let (columns, rest) = args.shared.split_at_mut(columns_len);
        let packed = if cached { &mut *args.cached } else { &mut rest[..packed_len] };
        if !cached || args.new_weights {
            pack(&gemm, args.inputs[1], packed);
        }
        let operand = |i: Option<usize>| i.map(|i| args.inputs[i]);
        let epilogue = Epilogue {
            bias: operand(addends[0]),
            per_image_bias: operand(addends[1]),
            residual: operand(addends[2]),
        };
        let operands = Operands { input: args.inputs[0], packed, epilogue };
        let (task, scratch) = (gemm.task_pixels(), args.scratch);
        let channels = gemm.output_channels();
        if let Some(panels) = by_columns {
            let pixels = gemm.output_len() / channels;
            let width = gemm.columns_of(panels);
            columns.par_chunks_mut(pixels * width).enumerate().for_each(|(i, out)| {
                let panels = i * panels..gemm.panel_count().min((i + 1) * panels);
                scratch.with(|memory| gemm.run_panels(operands, panels, out, memory));
            });
            return join_columns(columns, width, args.outputs[0], channels);
        }
        args.outputs[0].par_chunks_mut(task * channels).enumerate().for_each(|(i, out)| {
            scratch.with(|memory| gemm.run(operands, i * task, out, memory));
        });
    });
    let kernel = if cached {
        kernel.cached(packed_len).shared(columns_len)
    } else {
        kernel.shared(packed_len + columns_len)
    };
    kernel.per_thread(per_thread)
}

/// Joins parts of `width` columns (the last may be narrower), each with all pixels, to `[pixels][channels]`.
fn join_columns(parts: &[f32], width: usize, out: &mut [f32], channels: usize) {
    let pixels = out.len() / channels;
    for (pixel, out) in out.chunks_exact_mut(channels).enumerate() {
        for (out, part) in out.chunks_mut(width).zip(parts.chunks(pixels * width)) {
            out.copy_from_slice(&part[pixel * out.len()..][..out.len()]);
        }
    }
}

/// Packs all weights, the panels in parallel.
fn pack(gemm: &ImplicitGemm, weights: &[f32], packed: &mut [f32]) {
    let mut rest = packed;
    for phase in 0..gemm.phase_count() {
        let (part, tail) = rest.split_at_mut(gemm.panel_len(phase) * gemm.panel_count());
        part.par_chunks_mut(gemm.panel_len(phase).max(1)).enumerate().for_each(|(panel, out)| {
            gemm.pack_panel(phase, panel, weights, out);
        });
        rest = tail;
    }
}

impl Conv2dTranspose {
    /// An upsampling layer with a bias, whose output has height and width `size`.
    pub fn new(stride: usize, pad: impl Into<Padding>, size: (usize, usize)) -> Self {
        let (stride, pad) = ((stride, stride), pad.into());
        Self { stride, pad, size, like: None, gradient: false, bias: true }
    }

    /// The convolution whose transpose this is.
    fn geometry(&self, x: Shape, w: Shape) -> Result<ConvShape, String> {
        let [n, h, wd, c] = pixels(x);
        let Some([_, _, cin, cout]) = w.nhwc() else {
            return Err("weights must be [kh, kw, cin, cout]".to_owned());
        };
        if c != cout {
            return Err(format!("the weights expect {cout} channels, the input has {c}"));
        }
        let y = Shape::new(&[n, self.size.0, self.size.1, cin]);
        let shape = geometry(y, w, self.stride, self.pad)?;
        if shape.output != (h, wd) {
            let (oh, ow) = shape.output;
            return Err(format!(
                "the input must be {oh}x{ow} for an output of {}x{}",
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
            return Err(format!("expected {} operands, got {}", 2 + usize::from(self.bias), inputs.len()));
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
        // The data gradient is the convolution itself; the weight gradient swaps input and output.
        let conv = Conv2d { stride: self.stride, pad: self.pad, ..Conv2d::default() };
        let dx = if b.needs_grad(0) { Some(b.graph.add(&name, conv, &[dy, w])?) } else { None };
        let weights = b.graph.shape(w);
        let grad = Conv2dWeightGrad { weights, stride: self.stride, pad: self.pad, bias: false };
        let dw = b.graph.add(&name, grad, &[dy, x])?;
        let mut grads = vec![dx, Some(dw)];
        if self.bias {
            grads.push(Some(b.graph.add(&name, SumRows, &[dy])?));
        }
        Ok(Some(grads))
    }

    fn multiply_adds(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        self.checked(inputs).multiply_adds() as u64
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (shape, addends) = (self.checked(inputs), [self.bias.then_some(2), None, None]);
        let matmul_dtype = ctx.compute().matmul_dtype;
        let winograd_dtype = if self.gradient { matmul_dtype } else { MatmulDtype::F32 };
        match winograd::chosen(ctx, Winograd::data_grad(ctx.isa(), winograd_dtype, shape)) {
            Some(conv) => winograd::conv_kernel(conv, addends),
            None => {
                implicit_gemm_kernel(ctx, ImplicitGemm::data_grad(ctx.isa(), matmul_dtype, shape), addends)
            }
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

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], outputs: &[TensorType]) -> Kernel {
        let shape = geometry_of(inputs[0], outputs[0], self.stride, self.pad);
        if let Some(grad) = WinogradGrad::new(ctx.isa(), ctx.compute().matmul_dtype, shape)
            .filter(|w| ctx.compute().winograd && w.is_faster(ctx.compute().matmul_dtype))
        {
            return winograd::grad_kernel(grad, shape.cin, shape.cout);
        }
        let grad = WeightGrad::new(ctx.isa(), ctx.compute().matmul_dtype, shape);
        let (shared, per_thread) = (grad.tasks() * grad.partial_len(), grad.scratch_len());
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let partials = &mut args.shared[..grad.tasks() * grad.partial_len()];
            let (x, dy, scratch) = (args.inputs[0], args.inputs[1], args.scratch);
            partials.par_chunks_mut(grad.partial_len()).enumerate().for_each(|(task, partial)| {
                scratch.with(|memory| grad.run(task, x, dy, partial, memory));
            });
            let partials = &*partials;
            let (dw, db) = args.outputs.split_first_mut().expect("a weight gradient has an output");
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
