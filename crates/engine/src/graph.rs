//! The graph: operations with static shapes, in the order they were added.

use crate::error::{Error, Result};
use crate::ops::Op;
use crate::shape::{DType, Shape, TensorType};

/// A tensor of a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tensor(pub(crate) u32);

impl Tensor {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// The role of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorKind {
    /// Written by the caller before a run.
    Input,
    /// A trained weight, with its index among the parameters.
    Parameter(usize),
    /// Persists from run to run, like a running average. An in-place operation updates it; nothing else in the same
    /// graph may read it.
    State,
    /// Computed by a node.
    Computed,
}

/// A tensor's type, kind and name.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Shape and data type.
    pub ty: TensorType,
    /// Its role.
    pub kind: TensorKind,
    /// A parameter's or input's name, or that of the node that computes it.
    pub name: String,
    /// Whether a parameter's gradient goes through it.
    pub differentiable: bool,
}

/// An operation with its operands.
#[derive(Clone, Debug)]
pub struct Node {
    /// The operation.
    pub op: Op,
    /// The operands.
    pub inputs: Vec<Tensor>,
    /// The outputs.
    pub outputs: Vec<Tensor>,
    /// Where in the network, such as `downs.0.attentions.1`.
    pub name: String,
}

/// A graph, under construction or complete.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    tensors: Vec<TensorInfo>,
    nodes: Vec<Node>,
    parameters: Vec<Tensor>,
    states: Vec<Tensor>,
    /// Nodes before the backward pass.
    forward: Option<usize>,
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    fn tensor(&mut self, ty: TensorType, kind: TensorKind, name: &str, differentiable: bool) -> Tensor {
        self.tensors.push(TensorInfo { ty, kind, name: name.to_owned(), differentiable });
        Tensor(self.tensors.len() as u32 - 1)
    }

    /// A tensor that the caller writes before each run.
    pub fn input(&mut self, name: &str, shape: impl Into<Shape>) -> Tensor {
        self.tensor(TensorType::f32(shape), TensorKind::Input, name, false)
    }

    /// A trained weight.
    pub fn parameter(&mut self, name: &str, shape: impl Into<Shape>) -> Tensor {
        let kind = TensorKind::Parameter(self.parameters.len());
        let t = self.tensor(TensorType::f32(shape), kind, name, true);
        self.parameters.push(t);
        t
    }

    /// A tensor that persists from run to run.
    pub fn state(&mut self, name: &str, shape: impl Into<Shape>) -> Tensor {
        let t = self.tensor(TensorType::f32(shape), TensorKind::State, name, false);
        self.states.push(t);
        t
    }

    /// Adds an operation and returns its first output.
    pub fn add(&mut self, name: &str, op: impl Into<Op>, inputs: &[Tensor]) -> Result<Tensor> {
        Ok(self.add_all(name, op, inputs)?[0])
    }

    /// Adds an operation and returns all its outputs.
    pub fn add_all(&mut self, name: &str, op: impl Into<Op>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let op = op.into();
        let types: Vec<TensorType> = inputs.iter().map(|&t| self.ty(t)).collect();
        let outputs = op.operation().infer(&types).map_err(|reason| Error::Shape {
            node: name.to_owned(),
            operation: op.operation().name(),
            reason,
            shapes: types.iter().map(|t| t.shape).collect(),
        })?;
        let differentiable = inputs.iter().any(|&t| self.info(t).differentiable);
        let outputs: Vec<Tensor> = outputs
            .into_iter()
            .map(|ty| self.tensor(ty, TensorKind::Computed, name, differentiable))
            .collect();
        self.nodes.push(Node {
            op,
            inputs: inputs.to_vec(),
            outputs: outputs.clone(),
            name: name.to_owned(),
        });
        Ok(outputs)
    }

    /// All nodes, in topological order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Replaces all nodes; the first `forward` of them precede the backward pass, if there is one.
    pub(crate) fn set_nodes(&mut self, nodes: Vec<Node>, forward: Option<usize>) {
        (self.nodes, self.forward) = (nodes, forward);
    }

    /// Index of the first node of the backward pass; `None` if it was not added.
    pub fn backward_start(&self) -> Option<usize> {
        self.forward
    }

    /// Nodes added from here on belong to the backward pass.
    pub(crate) fn begin_backward(&mut self) {
        self.forward.get_or_insert(self.nodes.len());
    }

    /// A new computed tensor with the shape, name and differentiability of `t`.
    pub(crate) fn new_like(&mut self, t: Tensor, dtype: DType) -> Tensor {
        let TensorInfo { ty, name, differentiable, .. } = self.info(t).clone();
        self.tensor(TensorType { dtype, ..ty }, TensorKind::Computed, &name, differentiable)
    }

    /// Changes the data type of a computed tensor.
    pub(crate) fn set_dtype(&mut self, t: Tensor, dtype: DType) {
        self.tensors[t.index()].ty.dtype = dtype;
    }

    /// All parameters, in the order they were added.
    pub fn parameters(&self) -> &[Tensor] {
        &self.parameters
    }

    /// All states, in the order they were added.
    pub fn states(&self) -> &[Tensor] {
        &self.states
    }

    /// Number of elements in all parameters.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(|&p| self.shape(p).len()).sum()
    }

    /// Number of tensors.
    pub fn tensor_count(&self) -> usize {
        self.tensors.len()
    }

    /// Type, role and name of a tensor.
    pub fn info(&self, t: Tensor) -> &TensorInfo {
        &self.tensors[t.index()]
    }

    /// A tensor's type.
    pub fn ty(&self, t: Tensor) -> TensorType {
        self.tensors[t.index()].ty
    }

    /// A tensor's shape.
    pub fn shape(&self, t: Tensor) -> Shape {
        self.ty(t).shape
    }

    /// Multiply-adds of one run of all nodes.
    pub fn multiply_adds(&self) -> u64 {
        self.nodes.iter().map(|n| self.node_multiply_adds(n)).sum()
    }

    /// Multiply-adds of one node (matrix products and convolutions; other operations count as 0).
    pub fn node_multiply_adds(&self, node: &Node) -> u64 {
        let types = |t: &[Tensor]| t.iter().map(|&t| self.ty(t)).collect::<Vec<_>>();
        node.op.operation().multiply_adds(&types(&node.inputs), &types(&node.outputs))
    }
}
