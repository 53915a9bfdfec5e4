//! Named sets of settings.

/// A named set of settings.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// The name `--preset` takes.
    pub name: &'static str,
    /// What it is for.
    pub about: &'static str,
    /// Its differences from the defaults, as TOML.
    pub settings: &'static str,
}

/// Preset names of earlier versions and their current names.
pub(super) const RENAMED_PRESETS: &[(&str, &str)] = &[("pictures", "images")]; // earlier name

/// The presets; `ddpm train` without arguments uses the first.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "digits",
        about: "built-in digits at 16x16, small network; trains in minutes on a laptop",
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
            [optimizer]
            lr = 2e-3
            [output]
            sample_every = 600
            sample_steps = 150
            checkpoint_every = 600",
    },
    Preset {
        name: "images",
        about: "your own images at their original size, small network; the default with --data",
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
            [optimizer]
            lr = 5e-4",
    },
    Preset {
        name: "digits28",
        about: "built-in digits at 28x28, the DDPM-Pytorch tutorial's network",
        settings: "data.size = 28",
    },
    Preset {
        name: "mnist",
        about: "the DDPM-Pytorch tutorial: MNIST at 28x28, T = 1000, Adam at 1e-4, batch size 64, 40 epochs",
        settings: "data.path = 'data/mnist'",
    },
    Preset {
        name: "textures",
        about: "the DDPM-Pytorch tutorial on colour images: like mnist, with three channels",
        settings: "
            [data]
            path = 'data/textures'
            size = 28
            channels = 3",
    },
    Preset {
        name: "cifar10",
        about: "the CIFAR-10 notebook: double-conv at 32x32, random crops, AdamW, learning rate reduced on plateaus",
        settings: "
            [data]
            path = 'data/cifar10'
            size = 32
            channels = 3
            resize_side = 40
            random_crop_scale = [0.8, 1.0]
            [network]
            name = 'double-conv'
            [train]
            epochs = 500
            [optimizer]
            lr = 3e-4
            name = 'adamw'
            weight_decay = 0.01
            [lr_schedule]
            name = 'plateau'
            plateau_patience = 5
            plateau_factor = 0.5",
    },
    Preset {
        name: "cars",
        about: "DeepFindr's notebook: RGB images at 64x64, T = 300, the simple U-Net, L1, Adam at 1e-3",
        settings: "
            [data]
            path = 'data/cars'
            size = 64
            channels = 3
            resize = 'exact'
            horizontal_flip = true
            [diffusion]
            timesteps = 300
            [network]
            name = 'simple'
            [train]
            epochs = 100
            batch_size = 128
            [loss]
            name = 'l1'
            [optimizer]
            lr = 1e-3
            [output]
            sample_every = 320
            sample_count = 16
            checkpoint_every = 640",
    },
    Preset {
        name: "bone-age",
        about: "the X-ray notebook: bone-age images listed in a CSV file, grey at 64x64; otherwise like cars, without flips",
        settings: "
            [data]
            path = 'boneage-training-dataset'
            csv = 'boneage-training-dataset.csv'
            size = 64
            channels = 1
            resize = 'exact'
            [diffusion]
            timesteps = 300
            [network]
            name = 'simple'
            [train]
            epochs = 100
            batch_size = 128
            [loss]
            name = 'l1'
            [optimizer]
            lr = 1e-3
            [output]
            sample_every = 490
            sample_count = 16
            checkpoint_every = 980",
    },
    Preset {
        name: "ddpm-cifar10",
        about: "the paper's CIFAR-10 run (Ho et al. 2020): unet2d, dropout, warm-up, gradient clipping, slow EMA, 800,000 steps",
        settings: "
            [data]
            path = 'data/cifar10'
            size = 32
            channels = 3
            horizontal_flip = true
            [network]
            name = 'unet2d'
            [unet2d]
            dropout = 0.1
            [train]
            steps = 800000
            batch_size = 128
            [optimizer]
            lr = 2e-4
            clip_norm = 1.0
            [lr_schedule]
            warmup_steps = 5000
            [ema]
            decay = 0.9999
            [output]
            sample_every = 10000
            checkpoint_every = 5000",
    },
];
