//! The results, human-readable and as JSON.

use super::measure::{Part, Peak, node_seconds};
use crate::progress::human_bytes;
use ddpm::config::Config;
use ddpm::data::ImageShape;
use ddpm::text::thousands;
use ddpm_engine::NodeTime;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;

/// Number of slowest nodes listed.
const SLOWEST: usize = 20;

/// All results.
#[derive(Serialize)]
pub struct Report {
    version: &'static str,
    network: &'static str,
    parameters: usize,
    batch: usize,
    /// Height, width, channels.
    image: [usize; 3],
    device: String,
    /// Measured peak of all CPU threads, or of a GPU in large matmuls, in 1e9 operations per second.
    peak_gflops: f64,
    /// The same with bf16 operands, if the CPU has such an instruction.
    bf16_peak_gflops: Option<f64>,
    /// Memory bandwidth of a GPU, in 1e9 bytes per second.
    memory_gbytes_per_second: Option<f64>,
    parts: Vec<Part>,
    #[serde(skip)]
    shape: ImageShape,
}

/// Totals of one operation over a run of the plan.
#[derive(Serialize)]
struct Operation {
    operation: &'static str,
    nodes: usize,
    seconds: f64,
    share: f64,
    gflop: f64,
    /// Bytes of operands and results, in 1e9.
    gbyte: f64,
    /// Sum of the nodes' minimum times at the GPU's peaks.
    floor_seconds: Option<f64>,
}

/// A node in one run of the plan.
#[derive(Serialize)]
struct Node<'a> {
    name: &'a str,
    operation: &'static str,
    seconds: f64,
    gflop: f64,
}

impl Report {
    /// A report on `parts` with the machine's peaks.
    pub fn new(config: &Config, shape: ImageShape, peak: Peak, parts: Vec<Part>) -> Self {
        let (parameters, device) =
            parts.first().map_or((0, String::new()), |p| (p.parameters, p.device.clone()));
        Self {
            version: env!("CARGO_PKG_VERSION"),
            network: config.build_network(shape.channels).name(),
            parameters,
            batch: config.images_per_step(),
            image: [shape.height, shape.width, shape.channels],
            device,
            peak_gflops: peak.flops / 1e9,
            bf16_peak_gflops: peak.bf16.map(|p| p / 1e9),
            memory_gbytes_per_second: peak.bytes.map(|p| p / 1e9),
            parts,
            shape,
        }
    }

    /// Writes one line of JSON; with `profile`, including the operations of the first part.
    pub fn write_json(&self, out: &mut impl Write, profile: bool) -> anyhow::Result<()> {
        let mut value = serde_json::to_value(self)?;
        if let Some(part) = self.parts.first().filter(|_| profile) {
            value["operations"] = serde_json::to_value(self.operations(&part.nodes))?;
            value["nodes"] = serde_json::to_value(slowest(&part.nodes).collect::<Vec<_>>())?;
        }
        Ok(writeln!(out, "{value}")?)
    }

    /// Writes the human-readable report; with `profile`, including the operations of the first part.
    pub fn write(&self, out: &mut impl Write, profile: bool) -> anyhow::Result<()> {
        writeln!(
            out,
            "{}, {} parameters, batch {}, {}, {}",
            self.network,
            thousands(self.parameters),
            self.batch,
            self.shape,
            self.device
        )?;
        let bf16 = self.bf16_peak_gflops.map_or_else(String::new, |p| format!("; bf16 {p:.0}"));
        let peak = self.peak_gflops;
        match self.memory_gbytes_per_second {
            None => writeln!(out, "f32 peak, multiply-adds in registers only: {peak:.0} GFLOP/s{bf16}")?,
            Some(memory) => writeln!(
                out,
                "peak, large matmuls at this precision: {peak:.0} GFLOP/s; memory, read and write: {memory:.0} GB/s"
            )?,
        }
        for part in &self.parts {
            self.write_part(out, part)?;
        }
        if self.memory_gbytes_per_second.is_none() {
            writeln!(
                out,
                "GFLOP count direct convolutions and the peak is that of f32, so Winograd and bf16 can exceed it."
            )?;
        }
        if let Some(part) = self.parts.first().filter(|_| profile) {
            self.write_profile(out, part)?;
        }
        Ok(())
    }

    fn write_part(&self, out: &mut impl Write, part: &Part) -> anyhow::Result<()> {
        let step = match part.part {
            "train" | "forward" => String::new(),
            _ if part.images == 1 => {
                format!(
                    "a step of one image, {:.2} s for {} steps",
                    part.seconds * part.steps as f64,
                    part.steps
                )
            }
            _ => format!("a step of {} images, {} steps each:", part.images, part.steps),
        };
        let speed = match part.images {
            1 if !step.is_empty() => String::new(),
            _ => format!("{:.1} images/s", part.images_per_second),
        };
        let words = [step, speed].into_iter().filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ");
        writeln!(
            out,
            "{} {:.4} s  {words}  {:.1} GFLOP  {}  (min {:.4}, max {:.4}, {} runs)",
            part.part,
            part.seconds,
            part.gflop,
            self.rate(part.gflop, part.seconds).join("  "),
            part.least,
            part.most,
            part.runs
        )?;
        for share in &part.shares {
            writeln!(
                out,
                "  {:9}{:9.4} s {:5.1} %{:10.1} images/s  {}",
                share.name,
                share.seconds,
                100.0 * share.seconds / part.seconds,
                part.images as f64 / share.seconds,
                self.rate(share.gflop, share.seconds).join("  "),
            )?;
        }
        let resident = part.resident_bytes.map(|b| format!(", peak resident {}", human_bytes(b)));
        writeln!(
            out,
            "  memory   arena {}, scratch {}{}",
            human_bytes(part.arena_bytes as u64),
            human_bytes(part.scratch_bytes as u64),
            resident.unwrap_or_default()
        )?;
        Ok(())
    }

    /// "101.5 GFLOP/s" and "50 % of peak"; empty without multiply-adds.
    fn rate(&self, gflop: f64, seconds: f64) -> [String; 2] {
        let gflops = gflop / seconds;
        match gflop {
            0.0 => Default::default(),
            _ => [
                format!("{gflops:.1} GFLOP/s"),
                format!("{:.0} % of peak", 100.0 * gflops / self.peak_gflops),
            ],
        }
    }

    /// Minimum time of a node at a GPU's peaks: the larger of its arithmetic and of reading and writing its tensors once.
    fn floor(&self, node: &NodeTime) -> Option<f64> {
        let memory = self.memory_gbytes_per_second?;
        Some((gflop(node) / self.peak_gflops).max(gbyte(node) / memory))
    }

    /// Totals per operation, the slowest first.
    fn operations(&self, nodes: &[NodeTime]) -> Vec<Operation> {
        let mut kinds: BTreeMap<&'static str, Operation> = BTreeMap::new();
        for node in nodes.iter().filter(|n| n.runs > 0) {
            let operation = node.operation;
            let kind = kinds.entry(operation).or_insert(Operation {
                operation,
                nodes: 0,
                seconds: 0.0,
                share: 0.0,
                gflop: 0.0,
                gbyte: 0.0,
                floor_seconds: self.memory_gbytes_per_second.map(|_| 0.0),
            });
            kind.nodes += 1;
            kind.seconds += node_seconds(node);
            kind.gflop += gflop(node);
            kind.gbyte += gbyte(node);
            kind.floor_seconds = kind.floor_seconds.zip(self.floor(node)).map(|(all, one)| all + one);
        }
        let mut kinds: Vec<_> = kinds.into_values().collect();
        let total: f64 = kinds.iter().map(|k| k.seconds).sum();
        kinds.iter_mut().for_each(|k| k.share = k.seconds / total);
        kinds.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        kinds
    }

    fn write_profile(&self, out: &mut impl Write, part: &Part) -> anyhow::Result<()> {
        let columns = |gflop: f64, seconds: f64| {
            let [gflops, share] = self.rate(gflop, seconds);
            (gflops.replace(" GFLOP/s", ""), share.replace(" of peak", ""))
        };
        let memory = self.memory_gbytes_per_second;
        let heads = memory
            .map_or_else(String::new, |_| format!(" {:>8} {:>9} {:>9}", "GB/s", "of memory", "floor ms"));
        writeln!(
            out,
            "\n{:24} {:>6} {:>10} {:>7} {:>9} {:>8}{heads}",
            part.part, "nodes", "ms", "share", "GFLOP/s", "of peak"
        )?;
        let operations = self.operations(&part.nodes);
        for Operation { operation, nodes, seconds, share, gflop, gbyte, floor_seconds } in &operations {
            let (gflops, peak) = columns(*gflop, *seconds);
            let of_memory = memory.zip(*floor_seconds).map_or_else(String::new, |(memory, floor)| {
                let rate = gbyte / seconds;
                format!(" {rate:8.0} {:>9} {:9.3}", format!("{:.0} %", 100.0 * rate / memory), floor * 1e3)
            });
            writeln!(
                out,
                "{operation:24} {nodes:6} {:10.2} {:6.1}% {gflops:>9} {peak:>8}{of_memory}",
                seconds * 1e3,
                100.0 * share
            )?;
        }
        if let Some(floor) = operations.iter().map(|o| o.floor_seconds).sum::<Option<f64>>() {
            let all: f64 = operations.iter().map(|o| o.seconds).sum();
            writeln!(
                out,
                "all nodes {:.3} ms; at the peaks, node by node, {:.3} ms",
                all * 1e3,
                floor * 1e3
            )?;
        }
        writeln!(out, "\nslowest nodes")?;
        for Node { name, operation, seconds, gflop } in slowest(&part.nodes) {
            let (gflops, peak) = columns(gflop, seconds);
            writeln!(out, "{name:44} {operation:22} {:9.2} ms {gflops:>8} {peak:>6}", seconds * 1e3)?;
        }
        Ok(())
    }
}

fn gflop(node: &NodeTime) -> f64 {
    2e-9 * node.multiply_adds as f64
}

fn gbyte(node: &NodeTime) -> f64 {
    1e-9 * node.bytes as f64
}

/// The slowest nodes, the slowest first.
fn slowest(nodes: &[NodeTime]) -> impl Iterator<Item = Node<'_>> {
    let mut slowest: Vec<&NodeTime> = nodes.iter().filter(|n| n.runs > 0).collect();
    slowest.sort_by_key(|n| std::cmp::Reverse(n.time));
    slowest.into_iter().take(SLOWEST).map(|n| Node {
        name: &n.name,
        operation: n.operation,
        seconds: node_seconds(n),
        gflop: gflop(n),
    })
}
