//! The graph: operations with static shapes, in the order in which they were added.

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

/// What a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Written from outside before a run.
    Input,
    /// A trained weight; the number counts parameters in the order in which they were added.
    Parameter(usize),
    /// Keeps its numbers from run to run, as a running average does. An in-place operation on it changes it; nothing
    /// else may read it in the same graph.
    State,
    /// Computed by a node.
    Computed,
}

/// A tensor's type, kind and name.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Shape and number format.
    pub ty: TensorType,
    /// What it is.
    pub kind: Kind,
    /// A parameter's or input's name, or that of the node that makes it.
    pub name: String,
    /// Whether a parameter's gradient goes through it.
    pub differentiable: bool,
}

/// An operation with its operands.
#[derive(Clone, Debug)]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// From what.
    pub inputs: Vec<Tensor>,
    /// The results.
    pub outputs: Vec<Tensor>,
    /// Where in the network, as `downs.0.attentions.1`.
    pub name: String,
}

/// A graph under construction or complete.
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

    fn tensor(&mut self, ty: TensorType, kind: Kind, name: &str, differentiable: bool) -> Tensor {
        self.tensors.push(TensorInfo { ty, kind, name: name.to_owned(), differentiable });
        Tensor(self.tensors.len() as u32 - 1)
    }

    /// A tensor that is written from outside before each run.
    pub fn input(&mut self, name: &str, shape: impl Into<Shape>) -> Tensor {
        self.tensor(TensorType::f32(shape), Kind::Input, name, false)
    }

    /// A trained weight.
    pub fn parameter(&mut self, name: &str, shape: impl Into<Shape>) -> Tensor {
        let kind = Kind::Parameter(self.parameters.len());
        let t = self.tensor(TensorType::f32(shape), kind, name, true);
        self.parameters.push(t);
        t
    }

    /// A tensor that keeps its numbers from run to run.
    pub fn state(&mut self, name: &str, shape: impl Into<Shape>) -> Tensor {
        let t = self.tensor(TensorType::f32(shape), Kind::State, name, false);
        self.states.push(t);
        t
    }

    /// Adds an operation; its first result.
    pub fn add(&mut self, name: &str, op: impl Into<Op>, inputs: &[Tensor]) -> Result<Tensor> {
        Ok(self.add_all(name, op, inputs)?[0])
    }

    /// Adds an operation; all its results.
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
        let outputs: Vec<Tensor> =
            outputs.into_iter().map(|ty| self.tensor(ty, Kind::Computed, name, differentiable)).collect();
        self.nodes.push(Node {
            op,
            inputs: inputs.to_vec(),
            outputs: outputs.clone(),
            name: name.to_owned(),
        });
        Ok(outputs)
    }

    /// All nodes, each behind those that it needs.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Replaces all nodes; `forward` of them come before the backward pass, if there is one.
    pub(crate) fn set_nodes(&mut self, nodes: Vec<Node>, forward: Option<usize>) {
        (self.nodes, self.forward) = (nodes, forward);
    }

    /// Where the nodes of the backward pass begin; none: it was not added.
    pub fn backward_begins(&self) -> Option<usize> {
        self.forward
    }

    /// From here on nodes are of the backward pass.
    pub(crate) fn begin_backward(&mut self) {
        self.forward.get_or_insert(self.nodes.len());
    }

    /// A new computed tensor of the same shape, name and differentiability.
    pub(crate) fn twin(&mut self, t: Tensor, dtype: DType) -> Tensor {
        let TensorInfo { ty, name, differentiable, .. } = self.info(t).clone();
        self.tensor(TensorType { dtype, ..ty }, Kind::Computed, &name, differentiable)
    }

    /// Gives a computed tensor another number format.
    pub(crate) fn set_dtype(&mut self, t: Tensor, dtype: DType) {
        self.tensors[t.index()].ty.dtype = dtype;
    }

    /// All parameters, in the order in which they were added.
    pub fn parameters(&self) -> &[Tensor] {
        &self.parameters
    }

    /// All states, in the order in which they were added.
    pub fn states(&self) -> &[Tensor] {
        &self.states
    }

    /// Numbers in all parameters together.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(|&p| self.shape(p).len()).sum()
    }

    /// Number of tensors.
    pub fn tensor_count(&self) -> usize {
        self.tensors.len()
    }

    /// What is known of a tensor.
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

    /// Multiply-adds of one node (matrix products and convolutions; the rest counts nothing).
    pub fn node_multiply_adds(&self, node: &Node) -> u64 {
        let types = |t: &[Tensor]| t.iter().map(|&t| self.ty(t)).collect::<Vec<_>>();
        node.op.operation().multiply_adds(&types(&node.inputs), &types(&node.outputs))
    }
}
