//! Named sets of settings.

/// A named set of settings.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// The name `--preset` takes.
    pub name: &'static str,
    /// What it is for.
    pub about: &'static str,
    /// What it changes of the defaults, as TOML.
    pub settings: &'static str,
}

/// The presets; the first is what `ddpm train` without arguments uses.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "digits",
        about: "the built-in digits at 16x16 and a small network: minutes on a laptop",
        settings: "
            data.size = 16
            [attention]
            down_channels = [16, 32, 64]
            mid_channels = [64, 64, 32]
            down_sample = [true, true]
            num_down_layers = 1
            num_mid_layers = 1
            num_up_layers = 1
            [train]
            steps = 1200
            batch_size = 32
            lr = 2e-3
            sample_every = 600
            sample_steps = 150
            checkpoint_every = 600",
    },
    Preset {
        name: "pictures",
        about: "your own pictures at their own size and a small network: what --data uses without a preset",
        settings: "
            [attention]
            down_channels = [32, 64, 128]
            mid_channels = [128, 128, 64]
            down_sample = [true, true]
            num_down_layers = 1
            num_mid_layers = 1
            num_up_layers = 1
            [train]
            steps = 20000
            batch_size = 32
            lr = 5e-4",
    },
    Preset {
        name: "digits28",
        about: "the built-in digits at 28x28 and the tutorial's network",
        settings: "data.size = 28",
    },
    Preset {
        name: "mnist",
        about: "the DDPM-Pytorch tutorial: MNIST at 28x28, T = 1000, Adam at 1e-4, 40 epochs of batches of 64",
        settings: "data.path = 'data/mnist'",
    },
];
