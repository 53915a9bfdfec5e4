"""The PyTorch reference of the project's `AttentionUnet`: ResNet + self-attention blocks, the network of the
DDPM-Pytorch tutorial (conv_in, t_proj, downs, mids, ups), with its state-dict names and its arithmetic.

Constraints on the widths: `mid[0] == down[-1]`, `mid[-1] == down[-2]`; every width is a multiple of 8 (group norm)
and of `heads`; height and width are multiples of 2 for each True of `resample`. The last up block gives 16 channels.
"""
import torch
from torch import nn


def grow(v):
    return v[:, :, None, None]


def sincos(t, dim):
    """Sinusoidal embedding [B, dim] of timesteps [B], in f32 whatever the network's type: sines, then cosines."""
    freq = 10000 ** (torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    arg = t[:, None].float() / freq
    return torch.cat([arg.sin(), arg.cos()], dim=-1)


def norm_act_conv(cin, cout):
    return nn.Sequential(nn.GroupNorm(8, cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, padding=1))


class ResAttention(nn.Module):
    """`resnets` ResNet blocks, an attention behind each (down, up) or between them (mid)."""

    def __init__(self, cin, cout, temb, heads, resnets, attentions):
        super().__init__()
        ins = [cin] + [cout] * (resnets - 1)
        self.resnet_conv_first = nn.ModuleList(norm_act_conv(c, cout) for c in ins)
        self.t_emb_layers = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(temb, cout)) for _ in ins)
        self.resnet_conv_second = nn.ModuleList(norm_act_conv(cout, cout) for _ in ins)
        self.residual_input_conv = nn.ModuleList(nn.Conv2d(c, cout, 1) for c in ins)
        self.attention_norms = nn.ModuleList(nn.GroupNorm(8, cout) for _ in range(attentions))
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(cout, heads, batch_first=True) for _ in range(attentions))
        self.need_weights = True  # the tutorial's call; False takes PyTorch's fused attention

    def res(self, i, x, t):
        h = self.resnet_conv_first[i](x) + grow(self.t_emb_layers[i](t))
        return self.resnet_conv_second[i](h) + self.residual_input_conv[i](x)

    def att(self, i, x):
        b, c, h, w = x.shape
        q = self.attention_norms[i](x.reshape(b, c, h * w)).transpose(1, 2)
        out, _ = self.attentions[i](q, q, q, need_weights=self.need_weights)
        return x + out.transpose(1, 2).reshape(b, c, h, w)


class Down(ResAttention):
    def __init__(self, cin, cout, temb, heads, layers, resample):
        super().__init__(cin, cout, temb, heads, layers, layers)
        self.down_sample_conv = nn.Conv2d(cout, cout, 4, 2, 1) if resample else nn.Identity()

    def forward(self, x, t):
        for i in range(len(self.attentions)):
            x = self.att(i, self.res(i, x, t))
        return self.down_sample_conv(x)


class Mid(ResAttention):
    def __init__(self, cin, cout, temb, heads, layers):
        super().__init__(cin, cout, temb, heads, layers + 1, layers)

    def forward(self, x, t):
        x = self.res(0, x, t)
        for i in range(len(self.attentions)):
            x = self.res(i + 1, self.att(i, x), t)
        return x


class Up(ResAttention):
    def __init__(self, cin, cout, temb, heads, layers, resample):
        super().__init__(cin, cout, temb, heads, layers, layers)
        self.up_sample_conv = nn.ConvTranspose2d(cin // 2, cin // 2, 4, 2, 1) if resample else nn.Identity()

    def forward(self, x, skip, t):
        x = torch.cat([self.up_sample_conv(x), skip], dim=1)
        for i in range(len(self.attentions)):
            x = self.att(i, self.res(i, x, t))
        return x


class AttentionUnet(nn.Module):
    """x [B, channels, H, W], t [B] -> the predicted noise [B, channels, H, W]. `layers` are those of a down, a mid
    and an up block. The defaults are the tutorial's MNIST network, 10,188,081 parameters."""

    def __init__(self, channels=1, down=(32, 64, 128, 256), mid=(256, 256, 128), resample=(True, True, False),
                 temb=128, layers=(2, 2, 2), heads=4):
        super().__init__()
        n = len(down) - 1
        self.temb = temb
        self.t_proj = nn.Sequential(nn.Linear(temb, temb), nn.SiLU(), nn.Linear(temb, temb))
        self.conv_in = nn.Conv2d(channels, down[0], 3, padding=1)
        self.downs = nn.ModuleList(
            Down(down[i], down[i + 1], temb, heads, layers[0], resample[i]) for i in range(n))
        self.mids = nn.ModuleList(Mid(mid[i], mid[i + 1], temb, heads, layers[1]) for i in range(len(mid) - 1))
        self.ups = nn.ModuleList(
            Up(down[i] * 2, down[i - 1] if i else 16, temb, heads, layers[2], resample[i]) for i in reversed(range(n)))
        self.norm_out = nn.GroupNorm(8, 16)
        self.conv_out = nn.Conv2d(16, channels, 3, padding=1)

    def fused_attention(self):
        for m in self.modules():
            if isinstance(m, ResAttention):
                m.need_weights = False
        return self

    def forward(self, x, t):
        t = self.t_proj(sincos(t, self.temb).to(self.conv_in.weight.dtype))
        x = self.conv_in(x)
        skips = []
        for down in self.downs:
            skips.append(x)
            x = down(x, t)
        for mid in self.mids:
            x = mid(x, t)
        for up in self.ups:
            x = up(x, skips.pop(), t)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))
