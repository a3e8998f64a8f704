"""The networks: a Vision Transformer for any number of bands, the masked autoencoder around it, and the decoders.

Shapes in comments: B batch, C bands, H W pixels (rows, columns), P patch side, h w patch grid (h = H / P), N = h * w patches,
D width, R registers, T = 1 + R + N tokens, nh heads, hd = D / nh, L = number of visible patches, G groups of bands, K classes (DINOHead: prototypes).
Parameter names and shapes are those of the public MAE and DINOv2 checkpoints, so that weights can travel.
"""
import argparse
import copy
import math
import os
import re
import zipfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import UserError, band_matrix, blend_weights, cut_positions, one_line, plain_errors, same_bands

SIZES = {  # small and base are ViT-S and ViT-B (Touvron et al. 2021, Dosovitskiy et al. 2021); tiny is for laptops
    'tiny': dict(embed_dim=128, depth=6, num_heads=4),
    'small': dict(embed_dim=384, depth=12, num_heads=6),
    'base': dict(embed_dim=768, depth=12, num_heads=12),
}


# ============ parts ============

def patchify(x, patch_size):
    """x (B, C, H, W) -> patches (B, N, P*P*C), row by row; inside a patch the band index runs fastest (as MAE's targets)."""
    B, C, H, W = x.shape
    P = patch_size
    if H % P or W % P:
        raise UserError(f'an image of {H} x {W} pixels cannot be cut into patches of {P}: pass sides that are multiples of {P}')
    x = x.reshape(B, C, H // P, P, W // P, P)  # (B, C, h, P, w, P)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // P) * (W // P), P * P * C)


def unpatchify(patches, patch_size, h, w):
    """patches (B, N, P*P*C) -> x (B, C, h*P, w*P): the inverse of patchify."""
    B, P = len(patches), patch_size
    x = patches.reshape(B, h, w, P, P, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, h * P, w * P)


def sincos_encoding(values, dim):
    """values (G,), e.g. wavelengths in units of 10 nm -> (1, G, dim): sine and cosine at geometric frequencies (Vaswani et al. 2017)"""
    omega = 1 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = torch.as_tensor(values, dtype=torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)[None].float()


def sincos_positions(dim, h, w):
    """Fixed 2-d sine-cosine table (1, h*w, dim): half the channels code the column, half the row (MAE)."""
    if dim % 4:
        raise UserError(f'sine-cosine positions need a width that is a multiple of 4, not {dim}')
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
    return torch.cat([sincos_encoding(cols.flatten(), dim // 2), sincos_encoding(rows.flatten(), dim // 2)], dim=2)  # (1, h*w, dim)


def interpolate_positions(table, h, w):
    """Position table of a square grid (1, N, D) -> of an h x w grid (1, h*w, D), bicubic"""
    side = math.isqrt(table.shape[1])
    table = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(table.float(), size=(h, w), mode='bicubic').flatten(2).transpose(1, 2)


class PatchEmbed(nn.Module):
    """Linear map of each patch to a token. The weight is stored as the public checkpoints' strided convolution."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))  # as a linear layer (MAE)
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches):
        """patches (..., P*P*C) of patchify, any selection of them -> tokens (..., D)"""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P*P*C)
        return F.linear(patches, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017)."""

    def __init__(self, dim, num_heads, dropout=0.0):
        super().__init__()
        if dim % num_heads:
            raise UserError(f'a width of {dim} does not divide into {num_heads} heads')
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def heads(self, x):
        """x (B, T, D) -> queries, keys, values (B, nh, T, hd)"""
        return self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def weights(self, q, k):
        """q, k (B, nh, T, hd) -> softmax(q k' / sqrt(hd)) (B, nh, T, T): row i says how much token i takes from each token"""
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)

    def forward(self, x):
        """x (B, T, D) -> (B, T, D)"""
        B, T, D = x.shape
        q, k, v = self.heads(x)
        if x.is_cuda or T > 512:
            x = F.scaled_dot_product_attention(q, k, v)  # weights(q, k) @ v, fused
        else:  # the same spelled out: on CPUs, for short sequences, forward and backward are 2 to 8 times as fast, most so in bfloat16
            x = self.weights(q, k).to(v.dtype) @ v
        x = x.transpose(1, 2).reshape(B, T, D)
        return self.drop(self.proj(x))


class Mlp(nn.Module):
    def __init__(self, dim, hidden, dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer 2020, arXiv 2002.05202) at the same cost: hidden = 2/3 of the MLP's, rounded up to a multiple of 8."""

    def __init__(self, dim, hidden, dropout=0.0):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.drop(self.w3(F.silu(gate) * value))


class LayerScale(nn.Module):
    """A learned gain per channel on each residual branch (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, dim, init_values):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block. Drop path runs each branch on the kept samples only, as DINOv2 does: less work, same mean."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, ffn='mlp', init_values=0.0, drop_path=0.0, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, dropout)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = {'mlp': Mlp, 'swiglu': SwiGLU}[ffn](dim, int(dim * mlp_ratio), dropout)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path = drop_path

    def attention_branch(self, x):
        return self.ls1(self.attn(self.norm1(x)))

    def mlp_branch(self, x):
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x):
        """x (B, T, D) -> (B, T, D)"""
        if self.training and self.drop_path:
            x = add_to_kept_samples(x, self.attention_branch, self.drop_path)
            return add_to_kept_samples(x, self.mlp_branch, self.drop_path)
        x = x + self.attention_branch(x)
        return x + self.mlp_branch(x)


def add_to_kept_samples(x, branch, drop_rate):
    """Stochastic depth (Huang et al. 2016): a random share of the batch skips the branch, the rest is scaled up to keep the mean."""
    B = len(x)
    kept = max(1, round(B * (1 - drop_rate)))
    ids = torch.randperm(B, device=x.device)[:kept]
    return x.index_add(0, ids, branch(x.index_select(0, ids)).to(x.dtype), alpha=B / kept)


def init_linear(module):
    """Xavier for every linear layer, zero biases (MAE). LayerNorm starts at 1 and 0 by itself."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ============ Vision Transformer ============

class ViT(nn.Module):
    """Vision Transformer (arXiv 2010.11929) with DINOv2's options: registers (2309.16588), SwiGLU, LayerScale, drop path.

    Takes any height and width that are multiples of `patch_size` (the position table is interpolated) and any number of bands.
    `fixed_positions` gives MAE's sine-cosine table instead of a learned one; `mask_token` is for iBOT's masked patches.
    Token order: [cls, registers, patches].
    """

    def __init__(self, img_size: int = 64, patch_size: int = 8, in_chans: int = 32, embed_dim: int = 768, depth: int = 12,
                 num_heads: int = 12, mlp_ratio: float = 4.0, ffn: str = 'mlp', num_register_tokens: int = 0,
                 init_values: float = 0.0, drop_path_rate: float = 0.0, dropout: float = 0.0,
                 fixed_positions: bool = False, mask_token: bool = False):
        super().__init__()
        if img_size % patch_size:
            raise UserError(f'img_size {img_size} is not a multiple of patch_size {patch_size}: change one of the two')
        self.img_size, self.patch_size, self.in_chans, self.embed_dim = img_size, patch_size, in_chans, embed_dim
        self.num_prefix_tokens = 1 + num_register_tokens
        grid = img_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid * grid, embed_dim), requires_grad=not fixed_positions)
        self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim)) if mask_token else None
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, ffn, init_values, drop_path_rate, dropout)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        self.apply(init_linear)
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        if fixed_positions:
            nn.init.zeros_(self.pos_embed)
            self.pos_embed.data[:, 1:] = sincos_positions(embed_dim, grid, grid)
        else:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def positions(self, h, w):
        """Position table for an h x w grid of patches, (1, N, D): the learned one, or interpolated (bicubic) from it."""
        table = self.pos_embed[:, 1:]
        side = math.isqrt(table.shape[1])
        if (h, w) == (side, side):
            return table
        return interpolate_positions(table, h, w)

    def add_prefix(self, cls, tokens):
        """cls (1, 1, D), tokens (B, N, D) -> [cls, registers, tokens] (B, T, D)"""
        prefix = [cls] if self.register_tokens is None else [cls, self.register_tokens]
        return torch.cat([token.expand(len(tokens), -1, -1) for token in prefix] + [tokens], dim=1)

    def embed(self, x, mask=None):
        """x (B, C, H, W), mask (B, N) True = replaced by the mask token -> tokens (B, T, D) before the first block"""
        B, C, H, W = x.shape
        if C != self.in_chans:
            raise UserError(f'the image has {C} bands, the encoder was built for {self.in_chans}')
        tokens = self.patch_embed(patchify(x, self.patch_size))  # (B, N, D)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = tokens + self.positions(H // self.patch_size, W // self.patch_size)
        return self.add_prefix(self.cls_token + self.pos_embed[:, :1], tokens)  # (B, T, D)

    def forward(self, x, mask=None):
        """x (B, C, H, W) standardised, mask (B, N) bool or None -> normalised tokens (B, 1 + R + N, D)"""
        x = self.embed(x, mask)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def get_intermediate_layers(self, x, n=4):
        """x (B, C, H, W) -> the last n blocks' normalised patch tokens as n maps (B, D, h, w), earliest first"""
        B, _, H, W = x.shape
        x = self.embed(x)
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                patches = self.norm(x)[:, self.num_prefix_tokens:]  # (B, N, D)
                maps.append(patches.transpose(1, 2).reshape(B, -1, H // self.patch_size, W // self.patch_size))
        return maps


# ============ spatial-spectral Vision Transformer ============

class SpatialSpectralViT(ViT):
    """A ViT with a second stream whose tokens are groups of neighbouring bands; the streams are fused after each block.

    The spatial stream is the ViT above, its parameters keep their names. Fusion concatenates the two streams and adds a 1x1
    convolution of that to each (the dissertation's Fig. 3.5 and 3.6, after Chen et al. 2023). Two designs:

    `fusion='token'`, the dissertation's: a spectral token is the flattened pixel plane of its bands, and the 1x1 convolution takes
    the tokens of both streams as its channels. So sizes are fixed: crops of img_size, and of half that side (a second set of weights).
    `fusion='channel'`, ours: a spectral token is its bands pooled to a small grid, with one projection for all groups, and the
    convolution mixes channels: each token with the mean token of the other stream. Any image size.

    `wavelengths_nm` (C,) places the spectral tokens by a sine-cosine code of their mean wavelength; without them by band number.
    Spectral tokens are [spectral cls, registers (the same parameters as the spatial ones), G groups].
    """

    def __init__(self, *args, spectral_patch_size: int = 2, fusion: str = 'channel', wavelengths_nm: list = None,
                 wavelength_encoding: bool = True, spectral_grid: int = 4, mlp_ratio: float = 4.0, ffn: str = 'mlp',
                 init_values: float = 0.0, drop_path_rate: float = 0.0, dropout: float = 0.0, **kwargs):
        super().__init__(*args, mlp_ratio=mlp_ratio, ffn=ffn, init_values=init_values, drop_path_rate=drop_path_rate, dropout=dropout, **kwargs)
        if fusion not in ('token', 'channel'):
            raise UserError(f'fusion {fusion}: choose token or channel')
        D, depth, num_heads = self.embed_dim, len(self.blocks), self.blocks[0].attn.num_heads
        self.fusion, self.spectral_patch_size, self.spectral_grid = fusion, spectral_patch_size, spectral_grid
        self.wavelength_encoding = wavelength_encoding
        self.place_bands(wavelengths_nm)
        groups = self.num_groups
        self.spectral_cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.spectral_mask_token = nn.Parameter(torch.zeros(1, D)) if self.mask_token is not None else None
        self.spectral_blocks = nn.ModuleList(Block(D, num_heads, mlp_ratio, ffn, init_values, drop_path_rate, dropout) for _ in range(depth))
        self.spectral_norm = nn.LayerNorm(D, eps=1e-6)
        if fusion == 'token':
            sizes = {'': self.img_size, '_local': self.img_size // 2}
            self.spectral_pos_embed = nn.Parameter(torch.empty(1, 1 + groups, D))
            nn.init.trunc_normal_(self.spectral_pos_embed, std=0.02)
            self.fuse = nn.ModuleDict()
            for name, side in sizes.items():
                setattr(self, f'spectral_embed{name}', nn.Conv1d(side * side, D, spectral_patch_size, stride=spectral_patch_size))
                spatial, spectral = self.num_prefix_tokens + (side // self.patch_size) ** 2, self.num_prefix_tokens + groups
                self.fuse['spatial' + name] = nn.ModuleList(nn.Conv1d(spatial + spectral, spatial, 1) for _ in range(depth))
                self.fuse['spectral' + name] = nn.ModuleList(nn.Conv1d(spatial + spectral, spectral, 1) for _ in range(depth))
        else:
            self.spectral_pos_embed = None
            self.spectral_embed = nn.Linear(spectral_patch_size * spectral_grid ** 2, D)
            self.fuse = nn.ModuleDict({name: nn.ModuleList(nn.Linear(2 * D, D) for _ in range(depth)) for name in ('spatial', 'spectral')})

        for module in (self.spectral_blocks, self.spectral_embed):
            module.apply(init_linear)
        for parameter in self.fuse.parameters():
            nn.init.zeros_(parameter)  # the streams start apart and learn what to take from each other
        # Fusion is slowed down: AdamW moves a weight by lr whatever its gradient, and what is added to all tokens alike soon drowns what
        # tells them apart (the probe fell by 4 points without).
        self.fuse_scale = 0.1
        nn.init.normal_(self.spectral_cls_token, std=0.02)

    def place_bands(self, wavelengths_nm):
        """Sort in_chans bands into groups: their number G and the code of each one's mean wavelength (1, G, D)"""
        C, D, size = self.in_chans, self.embed_dim, self.spectral_patch_size
        groups = -(-C // size)  # the last band is repeated where the last group is not full
        nm = torch.arange(C) if wavelengths_nm is None else torch.tensor(wavelengths_nm, dtype=torch.float64) / 10
        nm = torch.cat([nm, nm[-1:].expand(groups * size - C)]).double().reshape(groups, -1).mean(1)
        code = sincos_encoding(nm, D) if self.wavelength_encoding else torch.zeros(1, groups, D)
        self.register_buffer('wavelength_code', code, persistent=False)
        self.wavelengths_nm, self.num_groups = wavelengths_nm, groups

    def at_wavelengths(self, wavelengths_nm):
        """A copy that takes bands at `wavelengths_nm` (C',) instead of its own, standardised as ever; images are not resampled.

        Channel fusion only. The spectral stream groups the new bands and codes their wavelengths; finer bands are more groups.
        A patch kernel is a function of wavelength: with R (C, C') that brings the new bands to the old ones (data.band_matrix, a
        response as wide as the old bands' steps), w' = w R answers to a spectrum as w does to the resampled one.
        """
        if self.fusion != 'channel' or not self.wavelengths_nm:
            raise UserError('other bands by their wavelengths: only for channel fusion, pre-trained on bands of known wavelengths')
        new, own = copy.deepcopy(self), np.asarray(self.wavelengths_nm, float)
        widths, order = np.full(len(own), 15.0), np.argsort(own)
        if len(own) > 1:
            widths[order] = np.gradient(own[order]).clip(min=1)
        matrix = torch.from_numpy(band_matrix(wavelengths_nm, own, widths)).to(self.patch_embed.proj.weight)  # (C, C')
        weight = torch.einsum('dcpq,ck->dkpq', self.patch_embed.proj.weight.detach(), matrix)
        new.patch_embed.proj.weight = nn.Parameter(weight)
        new.in_chans = new.patch_embed.proj.in_channels = len(wavelengths_nm)
        new.place_bands(list(wavelengths_nm))
        new.wavelength_code = new.wavelength_code.to(self.wavelength_code)
        if hasattr(self, 'args'):  # of load_encoder
            new.args = {**self.args, 'in_chans': new.in_chans, 'wavelengths_nm': new.wavelengths_nm}
            new.config = {**self.config, 'wavelengths_nm': new.wavelengths_nm, 'bands': ''}
        return new

    def embed_spectra(self, x, mask=None):
        """x (B, C, H, W), mask (B, G) True = replaced -> spectral tokens (B, 1 + R + G, D) before the first block"""
        B, C, H, W = x.shape
        missing = self.num_groups * self.spectral_patch_size - C
        if missing:
            x = torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1)], dim=1)
        if self.fusion == 'token':
            if H != W or H not in (self.img_size, self.img_size // 2):
                raise UserError(f'an image of {H} x {W} pixels: token fusion works at {self.img_size} and {self.img_size // 2} px only, '
                                'where its weights were made: choose --fusion=channel')
            embed = self.spectral_embed if H == self.img_size else self.spectral_embed_local
            tokens = embed(x.flatten(2).transpose(1, 2)).transpose(1, 2)  # (B, G, D)
        else:
            x = F.adaptive_avg_pool2d(x, self.spectral_grid)  # (B, C, 4, 4)
            tokens = self.spectral_embed(x.reshape(B, self.num_groups, -1))  # (B, G, D)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.spectral_mask_token.to(tokens.dtype), tokens)
        tokens, cls = tokens + self.wavelength_code, self.spectral_cls_token
        if self.spectral_pos_embed is not None:
            tokens, cls = tokens + self.spectral_pos_embed[:, 1:], cls + self.spectral_pos_embed[:, :1]
        return self.add_prefix(cls, tokens)

    def run_blocks(self, x, mask=None, spectral_mask=None):
        """Yields the two streams after each block and its fusion: spatial (B, T, D), spectral (B, 1 + R + G, D)"""
        local = '_local' if self.fusion == 'token' and x.shape[-1] != self.img_size else ''
        spatial, spectral = self.embed(x, mask), self.embed_spectra(x, spectral_mask)
        for i, (block, spectral_block) in enumerate(zip(self.blocks, self.spectral_blocks)):
            spatial, spectral = block(spatial), spectral_block(spectral)
            if self.fusion == 'token':
                for_spatial = for_spectral = torch.cat([spatial, spectral], dim=1)  # (B, T + 1 + R + G, D)
            else:  # each token with the other stream's mean: (B, T, 2D) and (B, 1 + R + G, 2D)
                spatial_mean, spectral_mean = spatial.mean(1, keepdim=True), spectral.mean(1, keepdim=True)  # (B, 1, D)
                for_spatial = torch.cat([spatial, spectral_mean.expand_as(spatial)], dim=2)
                for_spectral = torch.cat([spectral, spatial_mean.expand_as(spectral)], dim=2)
            spatial = spatial + self.fuse_scale * self.fuse['spatial' + local][i](for_spatial)
            spectral = spectral + self.fuse_scale * self.fuse['spectral' + local][i](for_spectral)
            yield spatial, spectral

    def forward(self, x, mask=None, spectral_mask=None):
        """x (B, C, H, W) standardised, masks (B, N) and (B, G) bool or None -> normalised tokens (B, 1 + R + N, D), (B, 1 + R + G, D)"""
        for spatial, spectral in self.run_blocks(x, mask, spectral_mask):
            pass
        return self.norm(spatial), self.spectral_norm(spectral)

    def get_intermediate_layers(self, x, n=4):
        """x (B, C, H, W) -> the spatial stream's last n maps (B, D, h, w). What the spectral stream found has reached them by fusion."""
        B, _, H, W = x.shape
        outputs = [self.norm(spatial)[:, self.num_prefix_tokens:] for spatial, _ in list(self.run_blocks(x))[-n:]]
        return [tokens.transpose(1, 2).reshape(B, -1, H // self.patch_size, W // self.patch_size) for tokens in outputs]


# ============ projection head of DINO and iBOT ============

class DINOHead(nn.Module):
    """Three linear layers, L2 normalisation, and the cosine to K learned prototypes (Caron et al. 2021, arXiv 2104.14294, appendix C).

    `last_layer.weight_g`, the prototypes' lengths, stays at 1 as in DINOv2 (`norm_last_layer` in DINO): lengths make training unstable.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = 2048, bottleneck_dim: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
                                 nn.Linear(hidden_dim, bottleneck_dim))
        self.last_layer = nn.Module()
        self.last_layer.weight_v = nn.Parameter(torch.empty(out_dim, bottleneck_dim))
        self.last_layer.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=False)
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.last_layer.weight_v, std=0.02)

    def forward(self, x):
        """x (..., D) -> logits (..., K): cosines in -1..1, before any temperature"""
        x = F.normalize(self.mlp(x).float(), dim=-1)  # (..., bottleneck)
        v, g = self.last_layer.weight_v, self.last_layer.weight_g
        return F.linear(x, v * (g / v.norm(dim=-1, keepdim=True).clamp(min=1e-12)))  # one product over the (K, bottleneck) matrix, not three


# ============ masked autoencoder ============

class MaskedAutoencoder(nn.Module):
    """Masked autoencoder (He et al. 2021, arXiv 2111.06377): the encoder sees the visible patches only, a small decoder
    predicts the pixels of the others. After training `.encoder` is an ordinary ViT that never hears of masks."""

    def __init__(self, img_size: int = 64, patch_size: int = 8, in_chans: int = 32, embed_dim: int = 768, depth: int = 12,
                 num_heads: int = 12, mlp_ratio: float = 4.0, decoder_embed_dim: int = 512, decoder_depth: int = 8,
                 decoder_num_heads: int = 16, norm_pix_loss: bool = False, dropout: float = 0.0, freeze_encoder: bool = False):
        super().__init__()
        # ---- encoder
        self.encoder = ViT(img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, dropout=dropout,
                           fixed_positions=True)
        # ---- decoder
        grid = img_size // patch_size
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, dropout=dropout)
                                            for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size ** 2 * in_chans)
        self.norm_pix_loss = norm_pix_loss

        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder_pos_embed.data[:, 1:] = sincos_positions(decoder_embed_dim, grid, grid)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_linear)
        self.freeze_encoder = freeze_encoder
        if freeze_encoder:
            self.encoder.requires_grad_(False)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()  # no dropout
        return self

    def random_masking(self, noise, mask_ratio):
        """noise (B, N): the patches with the smallest values stay -> ids_keep (B, L), ids_restore (B, N), mask (B, N), 1 = removed"""
        B, N = noise.shape
        keep = max(1, round(N * (1 - mask_ratio)))  # round, not int: int(100 * (1 - 0.9)) is 9
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = (ids_restore >= keep).float()
        return ids_shuffle[:, :keep], ids_restore, mask

    def forward_encoder(self, patches, ids_keep):
        """patches (B, N, P*P*C), ids_keep (B, L) -> latent (B, 1 + L, D). Only visible patches are embedded."""
        encoder = self.encoder
        x = encoder.patch_embed(gather_tokens(patches, ids_keep))  # (B, L, D)
        positions = encoder.pos_embed[0, 1:].index_select(0, ids_keep.flatten())
        x = x + positions.reshape(*ids_keep.shape, -1)
        cls = encoder.cls_token + encoder.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        for block in encoder.blocks:
            x = block(x)
        return encoder.norm(x)

    def forward_decoder(self, latent, ids_restore):
        """latent (B, 1 + L, D), ids_restore (B, N) -> pred (B, N, P*P*C) in image order"""
        x = self.decoder_embed(latent)
        B, N = ids_restore.shape
        hidden = self.mask_token.to(x.dtype).expand(B, N + 1 - x.shape[1], -1)
        patches = gather_tokens(torch.cat([x[:, 1:], hidden], dim=1), ids_restore)  # back in image order
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward_loss(self, patches, pred, mask):
        """Mean squared error over the removed patches; with norm_pix_loss each target patch has mean 0 and variance 1."""
        target = patches.float()
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (pred.float() - target).square().mean(-1)  # (B, N)
        return (error * mask).sum() / mask.sum()

    def forward(self, x, mask_ratio=0.75, noise=None):
        """x (B, C, H, W) standardised, noise (B, N) or None -> loss, pred (B, N, P*P*C), mask (B, N) with 1 = removed"""
        patches = patchify(x, self.encoder.patch_size)
        if patches.shape[1] != self.decoder_pos_embed.shape[1] - 1:
            raise UserError(f'the image has {patches.shape[1]} patches, this autoencoder was built for '
                             f'{self.decoder_pos_embed.shape[1] - 1}: crop to img_size {self.encoder.img_size}')
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=x.device)
        ids_keep, ids_restore, mask = self.random_masking(noise, mask_ratio)
        pred = self.forward_decoder(self.forward_encoder(patches, ids_keep), ids_restore)
        return self.forward_loss(patches, pred, mask), pred, mask


def gather_tokens(tokens, ids):
    """tokens (B, N, D), ids (B, L) -> (B, L, D). One index_select over flattened rows: faster than torch.gather on (B, L, D)."""
    B, N, D = tokens.shape
    rows = ids + torch.arange(B, device=ids.device)[:, None] * N
    return tokens.reshape(B * N, D).index_select(0, rows.flatten()).reshape(B, -1, D)


# ============ features and decoders ============

def encoder_bands(encoder, meta, path):
    """--bands that bring data of `meta` to the bands `encoder` was trained on, '' where they are its own. Where the wavelengths
    of one of the two are not known, only their number can be compared."""
    components = encoder.config.get('components')
    wavelengths = encoder.config.get('wavelengths_nm') or encoder.args.get('wavelengths_nm')
    bands = len(components[0]) if components else encoder.in_chans
    if wavelengths and meta['wavelengths_nm'] and not same_bands(wavelengths, meta['wavelengths_nm']):
        return encoder.config.get('bands') or ','.join(map(str, wavelengths))
    if bands != meta['num_bands']:
        raise UserError(f'{path}: the encoder was trained on {bands} bands, the data has {meta["num_bands"]}, and without '
                        'wavelengths on both sides nobody knows which is which: give data of the same bands')
    return ''


def dense_features(encoder, x, n=4, window=0, stride=0):
    """Feature maps of images larger than the encoder was trained on, blended over overlapping windows: a patch counts less near a window's edge.

    x (B, C, H, W) -> (B, n*D, h, w), the last n blocks' maps concatenated. `window` 0 takes the encoder's own img_size, -1 the
    whole image in one pass (positions interpolated); `stride` 0 is half a window, rounded to the patch grid. A quarter costs
    four times as much and sees every patch at four times as many places.
    """
    H, W = x.shape[-2:]
    P = encoder.patch_size
    if window < 0 or (H <= (window or encoder.img_size) and W <= (window or encoder.img_size)):
        return torch.cat(encoder.get_intermediate_layers(x, n), dim=1)
    window = window or encoder.img_size
    stride = max(P, min(stride or window // 2, window) // P * P)

    weight = blend_weights(window // P).to(x.device)
    lefts, total = cut_positions(max(W, window), window, stride), None
    count = x.new_zeros(H // P, W // P, dtype=torch.float32)
    for top in cut_positions(max(H, window), window, stride):
        pieces = torch.cat([x[:, :, top:top + window, left:left + window] for left in lefts])  # a row of windows goes through in one pass
        maps = torch.cat(encoder.get_intermediate_layers(pieces, n), dim=1).float()
        if total is None:
            total = maps.new_zeros(len(x), maps.shape[1], H // P, W // P)
        for left, part in zip(lefts, maps.split(len(x))):
            rows = slice(top // P, top // P + part.shape[2])
            cols = slice(left // P, left // P + part.shape[3])
            share = weight[:part.shape[2], :part.shape[3]]  # of an image narrower than the window, its upper left part
            total[:, :, rows, cols] += part * share
            count[rows, cols] += share
    return total / count


class LinearHead(nn.Module):
    """Batch norm and one 1x1 convolution on the last four blocks' maps, then bilinear upsampling to pixels.

    The 1x1 runs before the upsampling: both are linear, so the result is the same and K channels are resized instead of 4*D.
    """

    def __init__(self, in_dim, num_classes):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_dim)
        self.classifier = nn.Conv2d(in_dim, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, maps, size):
        """maps (B, n*D, h, w), size (H, W) -> logits (B, K, H, W)"""
        return F.interpolate(self.classifier(self.norm(maps)), size=size, mode='bilinear')


def conv3x3(in_dim, dim):
    """3x3 convolution; its norm is over groups of channels, so that a batch of 1 trains and N processes are one."""
    return nn.Sequential(nn.Conv2d(in_dim, dim, 3, padding=1, bias=False), nn.GroupNorm(8, dim), nn.GELU())


def deconv(in_dim, dim):
    """Transposed convolution that doubles height and width"""
    return nn.Sequential(nn.ConvTranspose2d(in_dim, dim, 2, stride=2, bias=False), nn.GroupNorm(8, dim), nn.GELU())


class ConvHead(nn.Module):
    """UNet-like decoder (Ronneberger et al. 2015, arXiv 1505.04597): deconvolutions double the map until a patch is a pixel wide, and at each
    step an earlier block's map joins. A ViT's maps are all of one size, so skips are brought up by deconvolutions too (UNETR, arXiv 2103.10504).

    log2(patch_size) steps; block maps that find no step of their own (small patches) join at the bottom.
    """

    def __init__(self, in_dim, num_classes, patch_size, width=256):
        super().__init__()
        D, steps = in_dim // 4, round(math.log2(patch_size))
        widths = [max(min(width, D) >> step, 32) for step in range(steps + 1)]
        self.num_skips = min(steps, 3)
        self.norm = nn.BatchNorm2d(in_dim)
        self.bottom = conv3x3((4 - self.num_skips) * D, widths[0])
        self.up = nn.ModuleList(deconv(widths[i], widths[i + 1]) for i in range(steps))
        self.skips = nn.ModuleList(nn.Sequential(*(deconv(D if j == 0 else widths[i + 1], widths[i + 1]) for j in range(i + 1)))
                                   for i in range(self.num_skips))
        self.merge = nn.ModuleList(conv3x3(widths[i + 1] * (2 if i < self.num_skips else 1), widths[i + 1]) for i in range(steps))
        self.classifier = nn.Conv2d(widths[-1], num_classes, 1)

    def forward(self, maps, size):
        """maps (B, 4*D, h, w), size (H, W) -> logits (B, K, H, W)"""
        maps = list(self.norm(maps).chunk(4, dim=1))  # earliest block first
        skips = [maps.pop(-2) for _ in range(self.num_skips)]  # the latest block starts at the bottom, the one before joins first
        x = self.bottom(torch.cat(maps, dim=1))  # (B, width, h, w)
        for i, (up, merge) in enumerate(zip(self.up, self.merge)):
            x = up(x)
            x = merge(torch.cat([x, self.skips[i](skips[i])], dim=1) if i < self.num_skips else x)
        return F.interpolate(self.classifier(x), size=size, mode='bilinear')  # changes nothing where patch_size is a power of 2


class TransformerHead(nn.Module):
    """Segmenter's mask transformer (Strudel et al. 2021, arXiv 2105.05633): class tokens attend to patches and to each other; a patch's logits are
    its cosines with the class tokens, normalised over classes."""

    def __init__(self, in_dim, num_classes, num_heads=12, depth=2):
        super().__init__()
        D = in_dim // 4
        self.norm = nn.BatchNorm2d(in_dim)
        self.embed = nn.Linear(in_dim, D)
        self.class_tokens = nn.Parameter(torch.empty(1, num_classes, D))
        self.blocks = nn.ModuleList(Block(D, num_heads) for _ in range(depth))
        self.final_norm = nn.LayerNorm(D, eps=1e-6)
        self.patch_proj, self.class_proj = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.class_tokens, std=0.02)

    def forward(self, maps, size):
        """maps (B, 4*D, h, w), size (H, W) -> logits (B, K, H, W)"""
        B, _, h, w = maps.shape
        K = self.class_tokens.shape[1]
        x = self.embed(self.norm(maps).flatten(2).transpose(1, 2))  # (B, h*w, D)
        x = torch.cat([x, self.class_tokens.expand(B, -1, -1)], dim=1)  # (B, h*w + K, D)
        for block in self.blocks:
            x = block(x)
        patches, classes = self.final_norm(x).split([h * w, K], dim=1)
        masks = F.normalize(self.patch_proj(patches), dim=-1) @ F.normalize(self.class_proj(classes), dim=-1).transpose(1, 2)
        logits = self.mask_norm(masks).transpose(1, 2).reshape(B, K, h, w)
        return F.interpolate(logits, size=size, mode='bilinear')


# ============ the CNN baseline ============

class Bottleneck(nn.Module):
    """Residual block of ResNet-50 (He et al. 2015, arXiv 1512.03385) with torchvision's names of parameters."""

    def __init__(self, in_dim, dim, stride=1, dilation=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_dim, dim, 1, bias=False), nn.BatchNorm2d(dim)
        self.conv2, self.bn2 = nn.Conv2d(dim, dim, 3, stride, dilation, dilation, bias=False), nn.BatchNorm2d(dim)
        self.conv3, self.bn3 = nn.Conv2d(dim, 4 * dim, 1, bias=False), nn.BatchNorm2d(4 * dim)
        self.downsample = None
        if stride > 1 or in_dim != 4 * dim:
            self.downsample = nn.Sequential(nn.Conv2d(in_dim, 4 * dim, 1, stride, bias=False), nn.BatchNorm2d(4 * dim))
        nn.init.zeros_(self.bn3.weight)  # each block starts as the identity (Goyal et al. 2017)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


def conv_bn(in_dim, dim, kernel=3, stride=1, dilation=1, groups=1):
    padding = dilation * (kernel // 2)
    return nn.Sequential(nn.Conv2d(in_dim, dim, kernel, stride, padding, dilation, groups, bias=False), nn.BatchNorm2d(dim), nn.ReLU())


def separable(in_dim, dim, dilation=1):
    """3x3 convolution of each channel by itself, then 1x1 over the channels: a ninth of the work (DeepLabV3+, section 3.1)"""
    return nn.Sequential(conv_bn(in_dim, in_dim, 3, dilation=dilation, groups=in_dim), conv_bn(in_dim, dim, 1))


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (Chen et al. 2018, arXiv 1802.02611) on ResNetV1c-50: the dissertation's CNN baseline.

    Stage 4 sees atrous convolutions at several rates (ASPP), the result is upsampled and merged with stage 1 for its edges. An FCN head on stage 3
    gives a second, auxiliary output for training. `stem='three'` is V1c's three 3x3 convolutions, 'seven' ResNet's one 7x7 (torchvision's);
    both halve the image, and pooling halves it again. `output_stride` 16 or 8 is the pixels between two features of stage 4.
    """

    def __init__(self, in_chans: int = 32, num_classes: int = 24, output_stride: int = 16, stem: str = 'three', width: int = 64,
                 blocks: tuple = (3, 4, 6, 3), head_dim: int = 256):
        super().__init__()
        if output_stride not in (8, 16) or stem not in ('three', 'seven'):
            raise UserError(f'output_stride {output_stride} and stem {stem}: choose 16 or 8, and three or seven')
        # ---- backbone
        self.stem = None
        if stem == 'three':
            self.stem = nn.Sequential(conv_bn(in_chans, width // 2, stride=2), conv_bn(width // 2, width // 2), conv_bn(width // 2, width))
        else:
            self.conv1, self.bn1 = nn.Conv2d(in_chans, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        strides, dilations = {16: ((1, 2, 2, 1), (1, 1, 1, 2)), 8: ((1, 2, 1, 1), (1, 1, 2, 4))}[output_stride]
        in_dim = width
        for i, (count, stride, dilation) in enumerate(zip(blocks, strides, dilations)):
            dim = width * 2 ** i
            stage = [Bottleneck(in_dim if j == 0 else 4 * dim, dim, stride if j == 0 else 1, dilation) for j in range(count)]
            setattr(self, f'layer{i + 1}', nn.Sequential(*stage))
            in_dim = 4 * dim
        # ---- head
        rates = (6, 12, 18) if output_stride == 16 else (12, 24, 36)
        self.aspp = nn.ModuleList([conv_bn(in_dim, head_dim, 1), *(separable(in_dim, head_dim, rate) for rate in rates)])
        self.pool = nn.Conv2d(in_dim, head_dim, 1)  # of the mean over the image; no norm: one value a tile has no batch to speak of
        self.bottleneck = conv_bn(5 * head_dim, head_dim, 1)
        self.low_level = conv_bn(4 * width, 48, 1)
        self.merge = nn.Sequential(separable(head_dim + 48, head_dim), separable(head_dim, head_dim), nn.Dropout(0.1))
        self.classifier = nn.Conv2d(head_dim, num_classes, 1)
        self.auxiliary = nn.Sequential(conv_bn(in_dim // 2, head_dim), nn.Dropout(0.1), nn.Conv2d(head_dim, num_classes, 1))  # FCN head
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x):
        """x (B, C, H, W) standardised -> logits (B, K, H, W), in training also the auxiliary ones"""
        size = x.shape[-2:]
        x = F.relu(self.bn1(self.conv1(x))) if self.stem is None else self.stem(x)
        low = self.layer1(F.max_pool2d(x, 3, 2, 1))  # (B, 256, H/4, W/4)
        middle = self.layer3(self.layer2(low))  # (B, 1024, H/16, W/16) at output stride 16
        x = self.layer4(middle)  # (B, 2048, H/16, W/16)
        pooled = F.relu(self.pool(x.mean((2, 3), keepdim=True))).expand(-1, -1, *x.shape[-2:])
        x = self.bottleneck(torch.cat([branch(x) for branch in self.aspp] + [pooled], dim=1))
        x = F.interpolate(x, size=low.shape[-2:], mode='bilinear')
        x = self.merge(torch.cat([x, self.low_level(low)], dim=1))
        logits = F.interpolate(self.classifier(x), size=size, mode='bilinear')
        if not self.training:
            return logits
        return logits, F.interpolate(self.auxiliary(middle), size=size, mode='bilinear')

    def load_imagenet(self, path):
        """Take the weights of a torchvision resnet50 file -> a sentence that says what was taken. The 7x7 stem is widened to any number of
        bands: each takes the mean of the red, green and blue kernel, times 3 / C, so that a grey image gives the same response."""
        weights = load_checkpoint(path)
        own = {name: value for name, value in self.state_dict().items() if name.startswith(('layer', 'conv1', 'bn1')) and not name.endswith('num_batches_tracked')}
        if 'conv1.weight' in weights and self.stem is None:
            C = self.conv1.in_channels
            weights['conv1.weight'] = weights['conv1.weight'].mean(1, keepdim=True).expand(-1, C, -1, -1) * 3 / C
        wrong = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
        if wrong:
            raise UserError(f'{path}: not the weights of a torchvision resnet50: {len(wrong)} tensors are missing or of another shape '
                            f'({", ".join(wrong[:3])} ...): pass a file of that network')
        self.load_state_dict({**self.state_dict(), **{name: weights[name] for name in own}})
        return (f'{path}: {len(own)} tensors taken; ' + ('the 7x7 stem widened to all bands' if self.stem is None else
                'the three-convolution stem is not in the file and starts fresh (--stem=seven takes the file\'s)'))


# ============ checkpoints ============

def load_checkpoint(path):
    """The dictionary in a checkpoint file. Runs no code from the file; a damaged or foreign file is told in a sentence."""
    if not os.path.isfile(path):
        raise UserError(f'{path}: there is no such checkpoint: pass the last.pt of a run directory')
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f'it holds a {type(content).__name__}')
        if zipfile.is_zipfile(path):  # torch looks at no checksum: a flipped bit would be a wrong weight
            with zipfile.ZipFile(path) as parts:
                damaged = parts.testzip()
            if damaged:
                raise ValueError(f'{damaged} in it is damaged')
        return content
    except Exception as error:  # whatever a damaged file makes the reader do
        raise UserError(f'{path}: not a checkpoint that can be read safely ({one_line(error)}): pass a file written by one of these scripts') from None


def load_encoder(path, img_size=0, patch_size=0, in_chans=0, wavelengths_nm=None, rgb_kernels='wavelength', whiten=0):
    """The encoder of a checkpoint written by a pre-training script, in eval mode: of a DINO run the teacher, as its papers do.
    Or of a public file (read_public): only that is adapted to the other arguments (0 = as in the file) and told its `whiten`.

    `encoder.config` holds the run's constants (the standardisation among them), `encoder.args` its arguments, `encoder.script`
    its script, or the name of the public file. Raises UserError when the file is damaged or of another network.
    """
    checkpoint = load_checkpoint(path)
    if not str(checkpoint.get('script')).startswith('pretrain_'):
        args, weights, _ = read_public(path)
        side, patch_size = args['img_size'] // args['patch_size'], patch_size or args['patch_size']
        args.update(img_size=img_size or side * patch_size, patch_size=patch_size, in_chans=in_chans or args['in_chans'])
        encoder = ViT(**args)
        adapted = adapt_patch_embed(weights, encoder.state_dict(), wavelengths_nm, rgb_kernels)
        encoder.load_state_dict(resize_positions(adapted, encoder.state_dict(), path), strict=True)
        encoder.config, encoder.args, encoder.script = {'whiten': whiten}, args, os.path.basename(path)
        return encoder.eval()
    try:
        encoder = (SpatialSpectralViT if 'fusion' in checkpoint['encoder_args'] else ViT)(**checkpoint['encoder_args'])
        prefix = 'teacher.encoder.' if any(name.startswith('teacher.') for name in checkpoint['model']) else 'encoder.'
        weights = {name.removeprefix(prefix): value for name, value in checkpoint['model'].items() if name.startswith(prefix)}
        encoder.load_state_dict(weights, strict=True)
        encoder.config, encoder.args, encoder.script = checkpoint['config'], checkpoint['encoder_args'], checkpoint['script']
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f'{path}: its encoder cannot be built again ({one_line(error)}): pass the last.pt of a pre-training run') from None
    return encoder.eval()


def resize_positions(weights, like, path):
    """Weights of a checkpoint -> the same with each position table interpolated (bicubic) to the grid of the state `like`.

    Raises UserError naming what else does not fit: names, or shapes (another size, patch, number of bands or prototypes).
    """
    weights = dict(weights)
    for name, table in weights.items():
        if name in like and name.endswith('pos_embed') and table.shape[1] != like[name].shape[1]:
            side = math.isqrt(like[name].shape[1] - 1)
            weights[name] = torch.cat([table[:, :1], interpolate_positions(table[:, 1:], side, side)], dim=1)
    wrong = sorted(set(weights) ^ set(like)) or sorted(name for name in like if like[name].shape != weights[name].shape)
    if wrong:
        raise UserError(f'{path}: does not fit this network: {len(wrong)} tensors differ ({", ".join(wrong[:4])} ...): pass the --size, '
                        '--patch_size, --out_dim and data of the run that wrote it')
    return weights


# ============ other people's weights ============

RGB_NM = (600.0, 540.0, 460.0)  # about where a camera's red, green and blue peak: public encoders learned from photographs


def read_public(path):
    """A public file of a ViT -> our ViT's arguments, its weights, weights of a MAE decoder ({} where the file has none).

    Read are MAE's files ({'model': state}, also with the decoder), DINO's, DINOv2's, and what export_encoder wrote with
    DINOv2's names. Width, depth, MLP, registers, patch, grid and bands show in names and shapes. Heads do not: they are 64
    channels wide, but for MAE's ViT-H and our tiny.
    """
    weights = load_checkpoint(path)
    if isinstance(weights.get('model'), dict) and 'script' not in weights:  # MAE's
        weights = weights['model']
    ndims = {name: value.ndim for name, value in weights.items() if isinstance(value, torch.Tensor)}
    if (ndims.get('pos_embed'), ndims.get('patch_embed.proj.weight')) != (3, 4) or len(ndims) < len(weights):
        raise UserError(f'{path}: this checkpoint holds no encoder, neither ours nor one with the names of MAE and DINOv2 '
                        f'(found {sorted(map(str, weights))[:6]}): pass the last.pt of a pre-training run, or a public file')
    decoder = {name: value.float() for name, value in weights.items()  # an encoder's mask token would be (1, D)
               if name.startswith('decoder_') or (name == 'mask_token' and value.ndim == 3)}
    weights = {name: value.float() for name, value in weights.items() if name not in decoder}

    D, C, P = weights['patch_embed.proj.weight'].shape[:3]
    depth = len({found[1] for found in (re.match(r'blocks\.(\d+)\.', name) for name in weights) if found})
    swiglu = 'blocks.0.mlp.w3.weight' in weights
    if swiglu:
        hidden = 1.5 * weights['blocks.0.mlp.w3.weight'].shape[1]  # SwiGLU takes 2/3 of what it is given
    else:
        hidden = len(weights['blocks.0.mlp.fc1.weight']) if 'blocks.0.mlp.fc1.weight' in weights else 4 * D
    heads = {1280: 16, **{width['embed_dim']: width['num_heads'] for width in SIZES.values()}}
    registers = weights['register_tokens'].shape[1] if 'register_tokens' in weights else 0
    args = dict(img_size=math.isqrt(weights['pos_embed'].shape[1] - 1) * P, patch_size=P, in_chans=C, embed_dim=D, depth=depth,
                num_heads=heads.get(D, max(1, D // 64)), mlp_ratio=hidden / D, ffn='swiglu' if swiglu else 'mlp',
                num_register_tokens=registers, init_values=1.0 if 'blocks.0.ls1.gamma' in weights else 0.0,
                mask_token='mask_token' in weights)
    with torch.device('meta'):  # names and shapes only
        like = ViT(**args).state_dict()
    wrong = sorted(set(weights) ^ set(like)) or sorted(name for name in like if like[name].shape != weights[name].shape)
    if wrong:
        raise UserError(f'{path}: these names or shapes are not those of a ViT of MAE or DINOv2 of width {D} and depth {depth}: '
                        f'{", ".join(wrong[:8])}{" ..." if len(wrong) > 8 else ""}: pass an encoder alone, with public names')
    return args, weights, decoder


def stretch(n, m):
    """(m, n) matrix that brings n pixels in a row to m: linear between pixel centres, and straight on beyond the outermost"""
    at = (torch.arange(m, dtype=torch.float64) + 0.5) * n / m - 0.5
    left = at.floor().clamp(0, max(n - 2, 0)).long()
    share, eye = (at - left)[:, None], torch.eye(n, dtype=torch.float64)
    return eye[left] * (1 - share) + eye[(left + 1).clamp(max=n - 1)] * share


def resize_kernel(kernel, P):
    """kernel (D, C, p, p) -> (D, C, P, P) that answers to a resized patch as the old one to the patch (FlexiViT, 2212.08013).

    <x, w> = <Bx, w'> for all patches x, with B their resizing, is solved by w' = pinv(B') w. B is `stretch` to larger patches
    and its pseudo-inverse to smaller ones, so that there w' = stretch' w, exact for all stretched patches. FlexiViT's own B
    averages there: 7 to 17 % off with kernels of white noise. Interpolating w would change answers by the ratio of areas.
    """
    p = kernel.shape[-1]
    matrix = stretch(P, p).T if P <= p else torch.linalg.pinv(stretch(p, P).T)  # (P, p), for rows and columns alike
    return (matrix @ kernel.double() @ matrix.T).to(kernel.dtype)


def spread_bands(kernel, C, wavelengths_nm=None, how='wavelength'):
    """kernel (D, c, P, P) -> (D, C, P, P) that answers to a grey image (all bands alike) as the old one did.

    'wavelength': a band takes the mixture of the two of the red, green and blue kernel (RGB_NM) it lies between, or the one at
    its end; each kernel is shared out over its bands so that its sum stays. Without `wavelengths_nm` (C,), C = c bands keep
    their kernels. Otherwise, and with 'repeat', each band takes the mean kernel times c / C.
    """
    c = kernel.shape[1]
    mixture = torch.ones(C, c, dtype=torch.float64)
    if how == 'wavelength' and c == 3 and wavelengths_nm and len(wavelengths_nm) == C:  # principal components have none
        nm, (r, g, b) = torch.tensor(wavelengths_nm, dtype=torch.float64), RGB_NM
        red, blue = ((nm - g) / (r - g)).clamp(0, 1), ((g - nm) / (g - b)).clamp(0, 1)
        mixture = torch.stack([red, 1 - red - blue, blue], dim=1)  # (C, 3)
        for k in range(3):
            if not mixture[:, k].any():  # a sensor that sees nothing there
                mixture[(nm - RGB_NM[k]).abs().argmin(), k] = 1
    elif how == 'wavelength' and C == c:
        mixture = torch.eye(c, dtype=torch.float64)
    return torch.einsum('dcpq,Cc->dCpq', kernel.double(), mixture / mixture.sum(0)).to(kernel.dtype)


def adapt_patch_embed(weights, like, wavelengths_nm, how):
    """Weights of a public encoder -> the same with the patch embedding brought to patch and bands of the state `like`; `how`:
    'wavelength' or 'repeat' (see spread_bands), or 'fresh', which keeps the one in `like`"""
    if how not in ('wavelength', 'repeat', 'fresh'):
        raise UserError(f'--rgb_kernels={how}: choose wavelength, repeat or fresh')
    if how == 'fresh':
        return {**weights, **{name: value for name, value in like.items() if name.startswith('patch_embed.')}}
    _, C, _, P = like['patch_embed.proj.weight'].shape
    kernel = resize_kernel(weights['patch_embed.proj.weight'], P)
    return {**weights, 'patch_embed.proj.weight': spread_bands(kernel, C, wavelengths_nm, how)}


def public_shape(path):
    """'' or a run of ours -> {}; a public file -> those of its ViT's arguments that a script's encoder has to take over"""
    if not path or 'script' in load_checkpoint(path):
        return {}
    names = ('embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'ffn', 'num_register_tokens', 'init_values')
    return {name: value for name, value in read_public(path)[0].items() if name in names}


def start_from(path, model, wavelengths_nm=None, rgb_kernels='wavelength'):
    """Fill `model` with the weights in a file -> a sentence that says which.

    From a run of the same script all, position tables interpolated. From a public file (read_public) each encoder's spatial
    stream, adapted, and a masked autoencoder's decoder, if the file has one of the same width and depth.
    """
    checkpoint, state = load_checkpoint(path), model.state_dict()
    if 'script' in checkpoint:
        model.load_state_dict(resize_positions(checkpoint['model'], state, path), strict=True)
        return f'{path}: all {len(state)} tensors taken'
    args, weights, decoder = read_public(path)
    taken, first = {}, 'patch_embed.proj.weight'
    for prefix in [name.removesuffix(first) for name in state if name.endswith(first)]:  # encoder; student's and teacher's
        like = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        adapted = adapt_patch_embed(weights, like, wavelengths_nm, rgb_kernels)
        if 'mask_token' not in like:
            adapted.pop('mask_token', None)  # of DINOv2; a masked autoencoder's encoder has none
        like = {name: value for name, value in like.items()  # without what starts fresh
                if name in adapted or not name.startswith(('spectral_', 'fuse.', 'mask_token'))}
        taken.update({prefix + name: value for name, value in resize_positions(adapted, like, path).items()})
    own = {name for name in state if name.startswith('decoder_') or name == 'mask_token'}  # a masked autoencoder's decoder
    last = {'decoder_pred.weight', 'decoder_pred.bias'}  # gives pixels: taken only if patch and bands are ours
    fits = {name: value for name, value in decoder.items()
            if name == 'decoder_pos_embed' or (name in own and state[name].shape == value.shape)}
    if set(decoder) == own and own <= set(fits) | last:
        taken.update(fits)
    model.load_state_dict(resize_positions({**state, **taken}, state, path), strict=True)
    part = re.compile(r'(?:student\.|teacher\.)?(?:encoder\.)?(decoder_pred|decoder|spectral|\w+)')
    fresh = sorted({part.match(name)[1] for name in set(state) - set(taken)})
    return (f'{path}: a public ViT of width {args["embed_dim"]}, depth {args["depth"]}, patches of {args["patch_size"]} px, '
            f'{args["in_chans"]} bands; its encoder is taken, what starts fresh: {", ".join(fresh) or "nothing"}')


def export_encoder(path_in, path_out, form='timm'):
    """Write an encoder of ours as plain tensors that load with strict=True into timm's ViT ('timm') or DINOv2's ('dinov2')
    -> the call that makes that network. Its input is to be standardised as the run did (data.standardization)."""
    encoder = load_encoder(path_in)
    if form not in ('timm', 'dinov2'):
        raise UserError(f'--form={form}: choose timm or dinov2')
    if isinstance(encoder, SpatialSpectralViT):
        raise UserError(f'{path_in}: has a second stream, which neither timm nor DINOv2 has: export a run of pretrain_mae.py or '
                        'pretrain_dino.py')
    weights, block, registers = encoder.state_dict(), encoder.blocks[0], encoder.num_prefix_tokens - 1
    swiglu = isinstance(block.mlp, SwiGLU)
    sizes = (f'img_size={encoder.img_size}, patch_size={encoder.patch_size}, in_chans={encoder.in_chans}, '
             f'embed_dim={encoder.embed_dim}, depth={len(encoder.blocks)}, num_heads={block.attn.num_heads}, '
             f'init_values={1.0 if isinstance(block.ls1, LayerScale) else None}')
    if form == 'dinov2':
        weights.setdefault('mask_token', torch.zeros(1, encoder.embed_dim))  # theirs always has one
        call = (f'DinoVisionTransformer({sizes}, mlp_ratio={encoder.args.get("mlp_ratio", 4.0)}, block_chunks=0, '
                f'ffn_layer="{"swiglufused" if swiglu else "mlp"}", num_register_tokens={registers})')
    else:
        weights.pop('mask_token', None)
        if registers:  # timm adds no position to the cls token of a ViT with registers
            weights['reg_token'], table = weights.pop('register_tokens'), weights['pos_embed']
            weights['cls_token'], weights['pos_embed'] = weights['cls_token'] + table[:, :1], table[:, 1:]
        names = {'w12': 'fc1', 'w3': 'fc2'}
        weights = {re.sub(r'(?<=\.mlp\.)(w12|w3)', lambda old: names[old[0]], name): value for name, value in weights.items()}
        ratio = len(weights['blocks.0.mlp.fc1.weight']) / encoder.embed_dim
        call = (f'timm.models.VisionTransformer({sizes}, mlp_ratio={ratio}, num_classes=0, reg_tokens={registers}, '
                f'no_embed_class={registers > 0}'
                f'{", mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU" if swiglu else ""})')
    torch.save({name: value.clone() for name, value in weights.items()}, path_out + '.tmp')
    os.replace(path_out + '.tmp', path_out)
    return call


if __name__ == '__main__':
    plain_errors()
    parser = argparse.ArgumentParser(description='Write an encoder for other programs.', allow_abbrev=False)
    parser.add_argument('--export', required=True, help='last.pt of a run of pretrain_mae.py or pretrain_dino.py')
    parser.add_argument('--out', default='vit.pth', help='file to write')
    parser.add_argument('--form', default='timm', help='whose names: timm or dinov2')
    arguments = parser.parse_args()
    call = export_encoder(arguments.export, arguments.out, arguments.form)
    print(f'{arguments.out}: loads with strict=True into\n{call}')
