//! Layers that the networks are built from.

use super::{Built, Init, Layout, ParameterSpec, StateSpec};
use crate::error::Result;
use ddpm_engine::ops::{
    self, Activation, Conv2d, Conv2dTranspose, Dropout, GroupNorm, Padding, Resample, Taps,
};
use ddpm_engine::{Graph, Tensor};

/// `eps` of PyTorch's normalisations.
pub const EPS: f32 = 1e-5;

/// What a network is built for: only training has dropout and batch statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// PyTorch's `train()`.
    Training,
    /// PyTorch's `eval()`.
    Sampling,
}

/// Adds layers to a graph, named like the PyTorch modules.
#[derive(Debug)]
pub struct Builder {
    /// The graph so far.
    pub graph: Graph,
    mode: Mode,
    parameters: Vec<ParameterSpec>,
    states: Vec<StateSpec>,
    dropouts: u32,
}

/// The settings of `nn.Conv2d`.
#[derive(Clone, Copy, Debug)]
pub struct ConvLayer {
    /// Output channels.
    pub out: usize,
    /// Height and width of the kernel.
    pub kernel: usize,
    /// Stride in both directions.
    pub stride: usize,
    /// Zero padding.
    pub pad: Padding,
    /// Whether to add a bias.
    pub bias: bool,
}

impl ConvLayer {
    /// Stride 1, same padding, with a bias.
    pub fn new(out: usize, kernel: usize) -> Self {
        Self { out, kernel, stride: 1, pad: Padding::even(kernel / 2), bias: true }
    }

    /// With a stride and padding on all sides.
    pub fn strided(self, stride: usize, pad: usize) -> Self {
        Self { stride, pad: Padding::even(pad), ..self }
    }

    /// Without bias.
    pub fn without_bias(self) -> Self {
        Self { bias: false, ..self }
    }
}

impl Builder {
    /// An empty graph.
    pub fn new(mode: Mode) -> Self {
        Self { graph: Graph::new(), mode, parameters: Vec::new(), states: Vec::new(), dropouts: 0 }
    }

    /// Finishes the graph.
    pub fn finish(self, prediction: Tensor) -> Built {
        Built { graph: self.graph, parameters: self.parameters, states: self.states, prediction }
    }

    /// A parameter with its PyTorch name and shape.
    pub fn parameter(&mut self, name: String, shape: &[usize], layout: Layout, init: Init) -> Tensor {
        let spec = ParameterSpec { name, shape: shape.to_vec(), layout, init };
        let t = self.graph.parameter(&spec.name, spec.engine_shape());
        self.parameters.push(spec);
        t
    }

    /// A PyTorch buffer: kept between steps and in checkpoints, but not trained.
    fn state(&mut self, name: String, shape: &[usize], value: f32) -> Tensor {
        let engine = if shape.is_empty() { &[1] } else { shape };
        let t = self.graph.state(&name, ddpm_engine::Shape::new(engine));
        self.states.push(StateSpec { name, shape: shape.to_vec(), value });
        t
    }

    /// Number of channels of a tensor.
    pub fn channels(&self, x: Tensor) -> usize {
        self.graph.shape(x).channels()
    }

    fn height_and_width(&self, x: Tensor) -> (usize, usize) {
        let dims = self.graph.shape(x);
        (dims.dims()[1], dims.dims()[2])
    }

    /// `gamma` and `beta` of a normalisation.
    fn scale_and_shift(&mut self, name: &str, c: usize) -> [Tensor; 2] {
        let gamma = self.parameter(format!("{name}.weight"), &[c], Layout::Plain, Init::Constant(1.0));
        [gamma, self.parameter(format!("{name}.bias"), &[c], Layout::Plain, Init::Constant(0.0))]
    }

    /// `nn.Conv2d`.
    pub fn conv(&mut self, name: &str, x: Tensor, layer: ConvLayer) -> Result<Tensor> {
        let ConvLayer { out, kernel, stride, pad, bias } = layer;
        let cin = self.channels(x);
        let init = Init::fan_in(cin * kernel * kernel);
        let shape = [out, cin, kernel, kernel];
        let mut operands = vec![x, self.parameter(format!("{name}.weight"), &shape, Layout::Conv, init)];
        if bias {
            operands.push(self.parameter(format!("{name}.bias"), &[out], Layout::Plain, init));
        }
        let op = Conv2d { stride: (stride, stride), pad, bias, ..Conv2d::default() };
        Ok(self.graph.add(name, op, &operands)?)
    }

    /// `nn.ConvTranspose2d` with a bias; `layer` describes the convolution whose transpose it is.
    pub fn conv_transpose(&mut self, name: &str, x: Tensor, layer: ConvLayer) -> Result<Tensor> {
        let ConvLayer { out, kernel, stride, pad, .. } = layer;
        let cin = self.channels(x);
        // PyTorch computes the fan-in from the second dimension of the weights.
        let init = Init::fan_in(out * kernel * kernel);
        let w = self.parameter(format!("{name}.weight"), &[cin, out, kernel, kernel], Layout::Conv, init);
        let b = self.parameter(format!("{name}.bias"), &[out], Layout::Plain, init);
        let (h, wd) = self.height_and_width(x);
        let size = |s: usize, pad: usize| (s - 1) * stride + kernel - pad;
        let size = (size(h, pad.before.0 + pad.after.0), size(wd, pad.before.1 + pad.after.1));
        Ok(self.graph.add(name, Conv2dTranspose::new(stride, pad, size), &[x, w, b])?)
    }

    /// `nn.Linear(_, out)`.
    pub fn linear(&mut self, name: &str, x: Tensor, out: usize) -> Result<Tensor> {
        let cin = self.channels(x);
        let w = self.parameter(format!("{name}.weight"), &[out, cin], Layout::Linear, Init::fan_in(cin));
        let b = self.parameter(format!("{name}.bias"), &[out], Layout::Plain, Init::fan_in(cin));
        Ok(self.graph.add(name, Conv2d::linear(), &[x, w, b])?)
    }

    /// `nn.Embedding(rows, c)`: the row of each image's class.
    pub fn embedding(&mut self, name: &str, label: Tensor, rows: usize, c: usize) -> Result<Tensor> {
        let table = self.parameter(format!("{name}.weight"), &[rows, c], Layout::Plain, Init::Normal);
        Ok(self.graph.add(name, ops::Embedding, &[table, label])?)
    }

    /// Adds the class embedding to the timestep embedding, if there are classes.
    pub fn add_class(&mut self, t: Tensor, label: Option<Tensor>, rows: Option<usize>) -> Result<Tensor> {
        let (Some(rows), Some(label)) = (rows, label) else { return Ok(t) };
        let class = self.embedding("class_embedding", label, rows, self.channels(t))?;
        self.add("class_embedding", t, class)
    }

    /// `nn.GroupNorm(groups, _, eps)`.
    pub fn group_norm(&mut self, name: &str, x: Tensor, groups: usize, eps: f32) -> Result<Tensor> {
        let c = self.channels(x);
        let [gamma, beta] = self.scale_and_shift(name, c);
        Ok(self.graph.add(name, GroupNorm { groups, eps, silu: false }, &[x, gamma, beta])?)
    }

    /// `nn.LayerNorm` over the channels.
    pub fn layer_norm(&mut self, name: &str, x: Tensor) -> Result<Tensor> {
        let c = self.channels(x);
        let [gamma, beta] = self.scale_and_shift(name, c);
        Ok(self.graph.add(name, ops::LayerNorm { eps: EPS }, &[x, gamma, beta])?)
    }

    /// `nn.BatchNorm2d` with its running statistics.
    pub fn batch_norm(&mut self, name: &str, x: Tensor) -> Result<Tensor> {
        const MOMENTUM: f32 = 0.1;
        let c = self.channels(x);
        let [gamma, beta] = self.scale_and_shift(name, c);
        let mean = self.state(format!("{name}.running_mean"), &[c], 0.0);
        let variance = self.state(format!("{name}.running_var"), &[c], 1.0);
        let batches = self.state(format!("{name}.num_batches_tracked"), &[], 0.0);
        if self.mode == Mode::Sampling {
            let op = ops::BatchNormInference { eps: EPS };
            return Ok(self.graph.add(name, op, &[x, gamma, beta, mean, variance])?);
        }
        let outputs = self.graph.add_all(name, ops::BatchNorm { eps: EPS }, &[x, gamma, beta])?;
        for (running, value) in [(mean, outputs[1]), (variance, outputs[3])] {
            self.graph.add(name, ops::RunningAverage { momentum: MOMENTUM }, &[running, value])?;
        }
        self.graph.add(name, ops::Affine { scale: 1.0, shift: 1.0 }, &[batches])?;
        Ok(outputs[0])
    }

    /// `nn.MultiheadAttention(_, heads, dropout)` as self-attention over an image's pixels.
    pub fn attention(&mut self, name: &str, x: Tensor, heads: usize, dropout: f64) -> Result<Tensor> {
        let c = self.channels(x);
        let init = Init::xavier(c, 3 * c);
        let w = self.parameter(format!("{name}.in_proj_weight"), &[3 * c, c], Layout::Linear, init);
        let b = self.parameter(format!("{name}.in_proj_bias"), &[3 * c], Layout::Plain, Init::Constant(0.0));
        let qkv = self.graph.add(&format!("{name}.in_proj"), Conv2d::linear(), &[x, w, b])?;
        let o = self.attend(name, qkv, heads, dropout)?;
        let out = format!("{name}.out_proj");
        let w = self.parameter(format!("{out}.weight"), &[c, c], Layout::Linear, Init::fan_in(c));
        let b = self.parameter(format!("{out}.bias"), &[c], Layout::Plain, Init::Constant(0.0));
        Ok(self.graph.add(&out, Conv2d::linear(), &[o, w, b])?)
    }

    /// Softmax attention of queries, keys and values concatenated along channels.
    pub fn attend(&mut self, name: &str, qkv: Tensor, heads: usize, dropout: f64) -> Result<Tensor> {
        let dropout = self.next_dropout(dropout);
        Ok(self.graph.add(name, ops::Attention { heads, dropout }, &[qkv])?)
    }

    /// The next dropout site; `None` if nothing is dropped.
    fn next_dropout(&mut self, p: f64) -> Option<Dropout> {
        if p == 0.0 || self.mode == Mode::Sampling {
            return None;
        }
        self.dropouts += 1;
        Some(Dropout { p, site: self.dropouts })
    }

    /// `nn.Dropout(p)`.
    pub fn dropout(&mut self, name: &str, x: Tensor, p: f64) -> Result<Tensor> {
        match self.next_dropout(p) {
            Some(op) => Ok(self.graph.add(name, op, &[x])?),
            None => Ok(x),
        }
    }

    /// An activation function.
    pub fn activate(&mut self, name: &str, x: Tensor, act: Activation) -> Result<Tensor> {
        Ok(self.graph.add(name, ops::Activate(act), &[x])?)
    }

    /// SiLU.
    pub fn silu(&mut self, name: &str, x: Tensor) -> Result<Tensor> {
        self.activate(name, x, Activation::Silu)
    }

    /// `a + b`.
    pub fn add(&mut self, name: &str, a: Tensor, b: Tensor) -> Result<Tensor> {
        Ok(self.graph.add(name, ops::Add, &[a, b])?)
    }

    /// `scale x + shift`; adds nothing to the graph if that is x.
    pub fn affine(&mut self, name: &str, x: Tensor, scale: f64, shift: f64) -> Result<Tensor> {
        if (scale, shift) == (1.0, 0.0) {
            return Ok(x);
        }
        Ok(self.graph.add(name, ops::Affine { scale: scale as f32, shift: shift as f32 }, &[x])?)
    }

    /// `x + r` for every pixel of an image; `r` is `[n, c]`.
    pub fn add_per_channel(&mut self, name: &str, x: Tensor, r: Tensor) -> Result<Tensor> {
        Ok(self.graph.add(name, ops::AddPerChannel, &[x, r])?)
    }

    /// `x (1 + r)` for every pixel of an image; `r` is `[n, c]`.
    pub fn modulate(&mut self, name: &str, x: Tensor, r: Tensor) -> Result<Tensor> {
        Ok(self.graph.add(name, ops::Modulate, &[x, r])?)
    }

    /// Concatenates `a` and `b` along channels.
    pub fn concat(&mut self, name: &str, a: Tensor, b: Tensor) -> Result<Tensor> {
        Ok(self.graph.add(name, ops::Concat, &[a, b])?)
    }

    /// Channels `from .. from + len`.
    pub fn slice(&mut self, name: &str, x: Tensor, from: usize, len: usize) -> Result<Tensor> {
        Ok(self.graph.add(name, ops::Slice { from, len }, &[x])?)
    }

    /// `nn.MaxPool2d(2)`.
    pub fn max_pool(&mut self, name: &str, x: Tensor) -> Result<Tensor> {
        Ok(self.graph.add(name, ops::MaxPool, &[x])?)
    }

    /// Resamples both axes by the same rule, such as [`Taps::nearest_double`].
    pub fn resample(&mut self, name: &str, x: Tensor, taps: fn(usize) -> Taps) -> Result<Tensor> {
        let (h, w) = self.height_and_width(x);
        Ok(self.graph.add(name, Resample::both(taps, h, w), &[x])?)
    }

    /// The sinusoidal embedding of timesteps.
    pub fn time_embedding(&mut self, t: Tensor, op: ops::SinusoidalEmbedding) -> Result<Tensor> {
        Ok(self.graph.add("time_embedding", op, &[t])?)
    }
}
