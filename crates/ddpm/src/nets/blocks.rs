//! Layers that all networks are made of.

use super::{Built, Init, Layout, ParameterSpec};
use crate::error::Result;
use ddpm_engine::ops::{self, Conv2d, Conv2dTranspose, GroupNorm};
use ddpm_engine::{Graph, Tensor};

/// Adds layers to a graph. Names are those of the PyTorch modules.
#[derive(Debug, Default)]
pub struct Builder {
    /// The graph so far.
    pub graph: Graph,
    parameters: Vec<ParameterSpec>,
}

impl Builder {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the building.
    pub fn finish(self, prediction: Tensor) -> Built {
        Built { graph: self.graph, parameters: self.parameters, prediction }
    }

    /// A parameter with its PyTorch name and shape.
    pub fn parameter(&mut self, name: String, shape: &[usize], layout: Layout, init: Init) -> Tensor {
        let spec = ParameterSpec { name, shape: shape.to_vec(), layout, init };
        let t = self.graph.parameter(&spec.name, spec.engine_shape());
        self.parameters.push(spec);
        t
    }

    fn channels(&self, x: Tensor) -> usize {
        self.graph.shape(x).channels()
    }

    /// `nn.Conv2d(_, out, kernel, stride, pad)`.
    pub fn conv(
        &mut self,
        name: &str,
        x: Tensor,
        out: usize,
        kernel: usize,
        stride: usize,
        pad: usize,
    ) -> Result<Tensor> {
        let cin = self.channels(x);
        let init = Init::fan_in(cin * kernel * kernel);
        let w = self.parameter(format!("{name}.weight"), &[out, cin, kernel, kernel], Layout::Conv, init);
        let b = self.parameter(format!("{name}.bias"), &[out], Layout::Plain, init);
        Ok(self.graph.add(name, Conv2d::new(stride, pad), &[x, w, b])?)
    }

    /// `nn.ConvTranspose2d(_, out, kernel, stride, pad)`.
    pub fn conv_transpose(
        &mut self,
        name: &str,
        x: Tensor,
        out: usize,
        kernel: usize,
        stride: usize,
        pad: usize,
    ) -> Result<Tensor> {
        let cin = self.channels(x);
        // PyTorch takes the second dimension of the weights for the fan-in.
        let init = Init::fan_in(out * kernel * kernel);
        let w = self.parameter(format!("{name}.weight"), &[cin, out, kernel, kernel], Layout::Conv, init);
        let b = self.parameter(format!("{name}.bias"), &[out], Layout::Plain, init);
        let size = |s: usize| (s - 1) * stride + kernel - 2 * pad;
        let dims = self.graph.shape(x);
        let (h, wd) = (size(dims.dims()[1]), size(dims.dims()[2]));
        let op = Conv2dTranspose {
            stride: (stride, stride),
            pad: (pad, pad),
            size: (h, wd),
            like: None,
            bias: true,
        };
        Ok(self.graph.add(name, op, &[x, w, b])?)
    }

    /// `nn.Linear(_, out)`.
    pub fn linear(&mut self, name: &str, x: Tensor, out: usize) -> Result<Tensor> {
        let cin = self.channels(x);
        let w = self.parameter(format!("{name}.weight"), &[out, cin], Layout::Linear, Init::fan_in(cin));
        let b = self.parameter(format!("{name}.bias"), &[out], Layout::Plain, Init::fan_in(cin));
        Ok(self.graph.add(name, Conv2d::linear(), &[x, w, b])?)
    }

    /// `nn.GroupNorm(groups, _)`.
    pub fn group_norm(&mut self, name: &str, x: Tensor, groups: usize) -> Result<Tensor> {
        let c = self.channels(x);
        let gamma = self.parameter(format!("{name}.weight"), &[c], Layout::Plain, Init::Constant(1.0));
        let beta = self.parameter(format!("{name}.bias"), &[c], Layout::Plain, Init::Constant(0.0));
        Ok(self.graph.add(name, GroupNorm { groups, eps: 1e-5, silu: false }, &[x, gamma, beta])?)
    }

    /// `nn.MultiheadAttention(_, heads)` of a picture's pixels with themselves.
    pub fn attention(&mut self, name: &str, x: Tensor, heads: usize) -> Result<Tensor> {
        let c = self.channels(x);
        let init = Init::xavier(c, 3 * c);
        let w = self.parameter(format!("{name}.in_proj_weight"), &[3 * c, c], Layout::Linear, init);
        let b = self.parameter(format!("{name}.in_proj_bias"), &[3 * c], Layout::Plain, Init::Constant(0.0));
        let qkv = self.graph.add(&format!("{name}.in_proj"), Conv2d::linear(), &[x, w, b])?;
        let o = self.graph.add(name, ops::Attention { heads }, &[qkv])?;
        let out = format!("{name}.out_proj");
        let w = self.parameter(format!("{out}.weight"), &[c, c], Layout::Linear, Init::fan_in(c));
        let b = self.parameter(format!("{out}.bias"), &[c], Layout::Plain, Init::Constant(0.0));
        Ok(self.graph.add(&out, Conv2d::linear(), &[o, w, b])?)
    }

    /// SiLU.
    pub fn silu(&mut self, name: &str, x: Tensor) -> Result<Tensor> {
        Ok(self.graph.add(name, ops::Silu, &[x])?)
    }

    /// `a + b`.
    pub fn add(&mut self, name: &str, a: Tensor, b: Tensor) -> Result<Tensor> {
        Ok(self.graph.add(name, ops::Add, &[a, b])?)
    }

    /// `x + r` for every pixel of a picture; `r` is `[n, c]`.
    pub fn add_picture(&mut self, name: &str, x: Tensor, r: Tensor) -> Result<Tensor> {
        Ok(self.graph.add(name, ops::AddPicture, &[x, r])?)
    }

    /// `a` and `b`, channel behind channel.
    pub fn concat(&mut self, name: &str, a: Tensor, b: Tensor) -> Result<Tensor> {
        Ok(self.graph.add(name, ops::Concat, &[a, b])?)
    }

    /// The sinusoidal embedding of timesteps.
    pub fn time_embedding(&mut self, t: Tensor, dim: usize) -> Result<Tensor> {
        Ok(self.graph.add("time_embedding", ops::SinusoidalEmbedding { dim }, &[t])?)
    }
}
