//! A [`Model`] as a denoiser: batches on the host, or in the device's memory beside the tensors of the plan.

use super::{Model, NO_CLASS};
use crate::denoiser::{ConditionalDenoiser, ConditionalDeviceDenoiser, Denoiser};
use crate::process::Prediction;
use crate::sampler::buffers::{BufferId, LABELS, MAX_TERMS};
use crate::sampler::{DeviceDenoiser, NoiseKey, SamplerBuffers};
use ddpm_diffusion::{Error, Result};
use ddpm_engine::{PlanBuffers, RngKey, Tensor};
use ddpm_rng::Purpose;

/// An error of the engine as one of a denoiser.
fn device(error: ddpm_engine::Error) -> Error {
    crate::Error::from(error).into()
}

impl Model {
    fn label(&self) -> Result<Tensor> {
        let missing = || Error::Option {
            option: "class".to_owned(),
            reason: "the network takes no classes".to_owned(),
        };
        self.label.ok_or_else(missing)
    }

    /// The sampler's buffers, which only some devices have.
    fn plan_buffers(&mut self) -> Result<&mut dyn PlanBuffers> {
        let missing = || ddpm_engine::Error::Resources("the device has no sampler buffers".to_owned());
        self.exec.sampler_buffers().ok_or_else(missing).map_err(device)
    }
}

impl Denoiser for Model {
    fn batch(&self) -> usize {
        self.shape[0]
    }

    fn image_len(&self) -> usize {
        self.shape[1..].iter().product()
    }

    fn prediction(&self) -> Prediction {
        self.predicts
    }

    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> Result<()> {
        self.timesteps.fill(t as f32);
        self.exec.write(self.x, x_t).map_err(device)?;
        self.exec.write(self.t, &self.timesteps).map_err(device)?;
        self.exec.run(RngKey::default()).map_err(device)?;
        if let Some((v, values)) = &mut self.variance {
            self.exec.read(*v, values).map_err(device)?;
        }
        self.exec.read(self.prediction, output).map_err(device)
    }

    fn variance(&self) -> Option<&[f32]> {
        self.variance.as_ref().map(|(_, values)| values.as_slice())
    }

    fn as_device_denoiser(&mut self) -> Option<&mut dyn DeviceDenoiser> {
        if self.exec.sampler_buffers().is_some() { Some(self) } else { None }
    }
}

impl ConditionalDenoiser for Model {
    fn set_labels(&mut self, labels: &[Option<u32>]) -> Result<()> {
        let t = self.label()?;
        self.exec.write(t, &label_values(labels)).map_err(device)
    }

    fn as_conditional_device_denoiser(&mut self) -> Option<&mut dyn ConditionalDeviceDenoiser> {
        if self.exec.sampler_buffers().is_some() { Some(self) } else { None }
    }
}

impl DeviceDenoiser for Model {
    fn buffers(&mut self) -> Result<&mut dyn SamplerBuffers> {
        Ok(self)
    }

    fn predict_buffer(&mut self, x_t: BufferId, t: f64, output: BufferId) -> Result<()> {
        let (of_x, of_t, prediction) = (self.x, self.t, self.prediction);
        let buffers = self.plan_buffers()?;
        buffers.copy_to_tensor(of_x, id(x_t)).map_err(device)?;
        buffers.fill(of_t, t as f32).map_err(device)?;
        self.exec.run(RngKey::default()).map_err(device)?;
        self.plan_buffers()?.copy_from_tensor(id(output), prediction).map_err(device)
    }

    fn copy_variance(&mut self, to: BufferId) -> Result<bool> {
        let Some((variance, _)) = self.variance else { return Ok(false) };
        self.plan_buffers()?.copy_from_tensor(id(to), variance).map_err(device)?;
        Ok(true)
    }
}

impl ConditionalDeviceDenoiser for Model {
    fn upload_labels(&mut self, labels: &[Option<u32>]) -> Result<()> {
        self.plan_buffers()?.write(id(LABELS), &label_values(labels)).map_err(device)
    }

    fn select_labels(&mut self, conditional: bool) -> Result<()> {
        let t = self.label()?;
        let buffers = self.plan_buffers()?;
        let set = if conditional { buffers.copy_to_tensor(t, id(LABELS)) } else { buffers.fill(t, NO_CLASS) };
        set.map_err(device)
    }
}

/// The device's buffers, which lie beside the plan's tensors.
impl SamplerBuffers for Model {
    fn write(&mut self, to: BufferId, data: &[f32]) -> Result<()> {
        self.plan_buffers()?.write(id(to), data).map_err(device)
    }

    fn read(&mut self, from: BufferId, out: &mut [f32]) -> Result<()> {
        self.plan_buffers()?.read(id(from), out).map_err(device)
    }

    fn copy(&mut self, to: BufferId, from: BufferId) -> Result<()> {
        self.plan_buffers()?.copy(id(to), id(from)).map_err(device)
    }

    fn linear_combination(&mut self, to: BufferId, terms: &[(f64, BufferId)], divisor: f64) -> Result<()> {
        let mut all = [(0.0, id(to)); MAX_TERMS];
        all.iter_mut().zip(terms).for_each(|(all, &(c, v))| *all = (c, id(v)));
        self.plan_buffers()?.linear_combination(id(to), &all[..terms.len()], divisor).map_err(device)
    }

    fn normal(&mut self, to: BufferId, key: NoiseKey, purpose: Purpose, step: u32) -> Result<()> {
        let key = RngKey { seed: key.seed, step, first_index: key.first };
        self.plan_buffers()?.normal(id(to), key, purpose).map_err(device)
    }

    fn threshold(&mut self, v: BufferId, part: Option<f64>) -> Result<()> {
        self.plan_buffers()?.threshold(id(v), part).map_err(device)
    }

    fn apply_learned_std(&mut self, v: BufferId, z: BufferId, logarithms: [f64; 2]) -> Result<()> {
        self.plan_buffers()?.apply_learned_std(id(v), id(z), logarithms).map_err(device)
    }

    fn extrapolate(&mut self, y: BufferId, u: BufferId, scale: f32) -> Result<()> {
        self.plan_buffers()?.extrapolate(id(y), id(u), scale).map_err(device)
    }

    fn throttle(&mut self) -> Result<()> {
        self.plan_buffers()?.throttle().map_err(device)
    }
}

/// The engine's name of a sampler's buffer.
fn id(buffer: BufferId) -> ddpm_engine::BufferId {
    ddpm_engine::BufferId(buffer.0)
}

fn label_values(labels: &[Option<u32>]) -> Vec<f32> {
    labels.iter().map(|l| l.map_or(NO_CLASS, |l| l as f32)).collect()
}
