"""Predict a model's noise for a text, with any number of masks at once."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from nemo_prune.engine.compensation import Compensation
from nemo_prune.engine.layers import find_text_projections, layer_sizes
from nemo_prune.engine.memory import named_shortage, with_less_at_once
from nemo_prune.engine.precision import full_float32
from nemo_prune.errors import MaskError
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.settings import LocalizationSettings

# Texts that are encoded at once.
_TEXTS_AT_ONCE = 64


@contextmanager
def suppress(
    layers: Mapping[str, nn.Linear],
    gates: Mapping[str, Tensor],
    scale: float = 0.0,
    means: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Make neurons output 0, their mean, or a multiple of what they would, while the context lasts.

    Args:
        layers: dotted module name -> projection.
        gates: dotted module name -> bool [batch or 1, out_features], True = suppressed. A batch of 1
            holds for every sample.
        scale: what the suppressed outputs are multiplied by.
        means: dotted module name -> what suppressed neurons output instead of 0, [out_features].
    """

    def hook(name: str, gate: Tensor):
        if scale:
            return lambda module, inputs, output: torch.where(gate[:, None, :], output * scale, output)
        if means is not None:
            kept = means[name].to(gate.device, layers[name].weight.dtype)
            return lambda module, inputs, output: torch.where(gate[:, None, :], kept, output)
        # Filling instead of multiplying gives +0 as a zeroed row does, and stops NaN as well.
        return lambda module, inputs, output: output.masked_fill(gate[:, None, :], 0.0)

    handles = []
    try:
        for name, gate in gates.items():
            if gate.any():
                device = layers[name].weight.device
                handles.append(layers[name].register_forward_hook(hook(name, gate.to(device))))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def apply_mask(
    pipe: StableDiffusionPipeline,
    mask: NeuronMask,
    scale: float = 0.0,
    stored: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> Iterator[None]:
    """Suppress a mask's neurons in a live pipeline while the context lasts; nothing is written.

    Args:
        pipe: the unpruned model; it is given back untouched.
        mask: neurons of value projections, key projections or both; what it changes behind them is changed meanwhile.
        scale: what their outputs are multiplied by.
        stored: name of a parameter -> its dtype in the file, to which what is changed behind is rounded: then a live
            model of higher precision has the same.

    Raises:
        MaskError: the mask was made for a model with other layers.
    """
    layers = find_text_projections(pipe.unet, "both")
    mask.check(layer_sizes(layers))
    gates = {name: pruned[None] for name, pruned in mask.layers.items()}
    with suppress(layers, gates, scale), changed_behind(pipe.unet, mask, stored):
        yield


@contextmanager
def changed_behind(
    unet: UNet2DConditionModel, mask: NeuronMask, stored: Mapping[str, torch.dtype] = MappingProxyType({})
) -> Iterator[None]:
    """Change biases and weights behind the attention of a live model while the context lasts, as a file has them.

    Raises:
        MaskError: the mask was made for a model with other layers.
    """
    parameters = dict(unet.named_parameters())
    before: dict[str, Tensor] = {}
    try:
        for name in mask.behind:
            if name not in parameters or not mask.fits_behind(name, parameters[name].shape):
                raise MaskError(f"The mask changes `{name}`, which the model has not in that size. Is it another's?")
            values = before[name] = parameters[name].data
            changed = mask.changed_behind(name, values.to(stored.get(name, values.dtype)))
            parameters[name].data = changed.to(values.dtype)
        yield
    finally:
        for name, values in before.items():
            parameters[name].data = values


def draw_latents(unet: UNet2DConditionModel, num_samples: int, seed: int | torch.Generator) -> Tensor:
    """Initial latents [num_samples, channels, height, width], float32, by one generator on the CPU, which may go on."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator("cpu").manual_seed(seed) if isinstance(seed, int) else seed
    return torch.randn((num_samples, unet.config.in_channels, height, width), generator=generator)


class NoisePredictor:
    """Predicts the noise of the first steps, conditional and without guidance, as the paper scores it.

    The schedule is always DDIM's on the checkpoint's own scheduler settings. The model may predict
    the noise, the velocity (v) or the sample: the noise is derived from what it predicts.

    Args:
        pipe: a Stable Diffusion pipeline in evaluation mode.
        settings: number of samples, seed, schedule and timestep.
        batch_size: latents that go through the U-Net at once, always as many: the last digits of a
            prediction depend on it, but on nothing else in the batch, as long as a sample's tensors fill the
            processor's vectors, as those of published models do; in half precision on a GPU on the place in the
            batch, too. Halved where memory is short. By default those of two prompts, on a GPU of four.
        scale: what the outputs of suppressed neurons are multiplied by.
        compensation: what stands in for suppressed neurons; None where they output 0.

    Attributes:
        layers: dotted module name -> projection that is searched, in the order of execution.
        sizes: dotted module name -> number of neurons.
        timesteps: the schedule, the noisiest first.
        timestep: the one that the settings name.
        device: of the U-Net.
        dtype: of its weights.
        sample_passes: latents that went through the U-Net so far, without those that fill up a batch.
        computed_passes: the same with those.
        calls: size of a batch -> how many went through the U-Net.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        settings: LocalizationSettings,
        batch_size: int | None = None,
        scale: float = 0.0,
        compensation: Compensation | None = None,
    ) -> None:
        self.pipe = pipe
        self.settings = settings
        self.scale = scale
        self.compensation = compensation
        # The U-Net walks through all of its weights whenever it is asked for these.
        self.device, self.dtype = pipe.unet.device, pipe.unet.dtype
        self.batch_size = batch_size or settings.num_samples * (2 if self.device.type == "cpu" else 4)
        with named_shortage("the model and one sample"):
            self.layers = find_text_projections(pipe.unet, settings.projections)
        self.sizes = layer_sizes(self.layers)
        self.sample_passes = self.computed_passes = 0
        self.calls: Counter[int] = Counter()
        self._latents: dict[tuple[int, int], Tensor] = {}
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(settings.num_inference_steps)
        self.timesteps = tuple(scheduler.timesteps.tolist())
        self.timestep = self.timesteps[settings.timestep_index]
        self._alphas_cumprod = scheduler.alphas_cumprod
        self._prediction_type = scheduler.config.prediction_type

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings of prompts, [batch, positions, width], padded to the encoder's length.

        Raises:
            ModelError: the device's memory does not take a single text.
        """
        texts = list(texts)

        def encode(size: int) -> Tensor:
            parts = [texts[start : start + size] for start in range(0, len(texts), size)]
            return torch.cat([self._encode(part) for part in parts])

        return with_less_at_once(encode, min(len(texts), _TEXTS_AT_ONCE), "encoding a text")[0]

    def _encode(self, texts: list[str]) -> Tensor:
        with full_float32():
            embeds, _ = self.pipe.encode_prompt(
                texts, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return embeds

    @property
    def means(self) -> dict[str, Tensor] | None:
        """Dotted module name -> what suppressed neurons output instead of 0, [out_features]."""
        return None if self.compensation is None else self.compensation.means

    @property
    def is_combining(self) -> bool:
        """Whether kept neurons stand in for suppressed ones."""
        return self.compensation is not None and self.compensation.is_combining

    def in_weights(self, mask: NeuronMask) -> NeuronMask:
        """A mask with what it changes behind the attention, so that a model does what this predictor predicts."""
        return mask if self.compensation is None else self.compensation.in_weights(mask, self.pipe.unet)

    def initial_latents(self, seed: int | None = None, num_samples: int | None = None) -> Tensor:
        """Initial latents [S, channels, height, width], float32, drawn by one generator on the CPU.

        Args:
            seed: seed of the generator; that of the settings unless given.
            num_samples: S; that of the settings unless given.
        """
        settings = self.settings
        drawn = (settings.seed if seed is None else seed), num_samples or settings.num_samples
        # All prompts share them.
        if drawn not in self._latents:
            self._latents[drawn] = draw_latents(self.pipe.unet, drawn[1], drawn[0])
        return self._latents[drawn]

    @torch.no_grad()
    def predict_noise(
        self, latents: Tensor, prompt_embeds: Tensor, masks: Sequence[NeuronMask | None] = (None,)
    ) -> Tensor:
        """Predict the noise of every latent under every mask.

        Args:
            latents: initial latents [S, channels, height, width].
            prompt_embeds: text embeddings of one prompt, [positions, width].
            masks: M masks; None suppresses nothing.

        Returns:
            Predicted noise [M, S, channels, height, width], float32, on the model's device.

        Raises:
            MaskError: a mask was made for a model with other layers.
        """
        for mask in masks:
            if mask is not None:
                mask.check(self.sizes)
        num_masks, num_samples = len(masks), len(latents)
        suppressed = [() if mask is None else mask.neurons for mask in masks]
        predicted = self.predict_each(
            latents.repeat(num_masks, 1, 1, 1),
            prompt_embeds.expand(num_masks * num_samples, -1, -1),
            [neurons for neurons in suppressed for _ in range(num_samples)],
        )
        return predicted.unflatten(0, (num_masks, num_samples))

    @torch.no_grad()
    def predict_each(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        suppressed: Sequence[Collection[Neuron]],
        batch_size: int | None = None,
        timestep: int | None = None,
    ) -> Tensor:
        """Predict the noise of latents, each for a text of its own and with neurons of its own suppressed.

        A batch that is not full is filled up, so that a prediction does not depend on what it shares a
        batch with. Where the device's memory does not take a batch, the batch size is halved, for good.

        Args:
            latents: initial latents [batch, channels, height, width].
            prompt_embeds: text embeddings [batch, positions, width].
            suppressed: the neurons to suppress, one collection a sample.
            batch_size: how many at once, where it is not the predictor's own.
            timestep: of the model's training, where it is not the predictor's own.

        Returns:
            Predicted noise [batch, channels, height, width], float32, on the model's device.

        Raises:
            ModelError: the device's memory does not take a single sample.
        """
        timestep = self.timestep if timestep is None else timestep
        predicted: list[Tensor] = []
        done = 0
        while done < len(latents):
            size = min(batch_size or self.batch_size, self.batch_size)

            def predict(size: int, done: int = done) -> Tensor:
                part = slice(done, done + size)
                return self._predict_batch(latents[part], prompt_embeds[part], suppressed[part], size, timestep)

            output, taken = with_less_at_once(predict, size, "the model and one sample")
            if taken < size:
                self.batch_size = taken
            predicted.append(output)
            done += len(output)
            self.sample_passes += len(output)
            self.computed_passes += taken
            self.calls[taken] += 1
        return torch.cat(predicted)

    def _predict_batch(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        suppressed: Sequence[Collection[Neuron]],
        size: int,
        timestep: int,
    ) -> Tensor:
        unet, count = self.pipe.unet, len(latents)
        latents, prompt_embeds = (each.to(self.device) for each in (latents, prompt_embeds))
        filled = torch.arange(size, device=self.device).clamp_max(count - 1)
        with self._suppressing([*suppressed, *[suppressed[-1]] * (size - count)]), full_float32():
            output = unet(
                latents[filled].to(self.dtype),
                timestep,
                encoder_hidden_states=prompt_embeds[filled].to(self.dtype),
            ).sample
        return self.to_noise(output[:count].float(), latents, torch.full((count,), timestep))

    def _suppressing(self, suppressed: Sequence[Collection[Neuron]]) -> AbstractContextManager:
        """Suppress neurons of each sample of a batch while the context lasts."""
        if self.is_combining:
            return self.compensation.standing_in(self.pipe.unet, suppressed)
        return suppress(self.layers, self._gates(suppressed), self.scale, self.means)

    def _gates(self, suppressed: Sequence[Collection[Neuron]]) -> dict[str, Tensor]:
        """Dotted module name -> bool [batch, out_features], for the layers where anything is suppressed."""
        places: dict[str, tuple[list[int], list[int]]] = {}
        for sample, neurons in enumerate(suppressed):
            for layer, index in neurons:
                samples, indices = places.setdefault(layer, ([], []))
                samples.append(sample)
                indices.append(index)
        gates = {}
        for layer, (samples, indices) in places.items():
            gates[layer] = torch.zeros(len(suppressed), self.sizes[layer], dtype=torch.bool)
            gates[layer][samples, indices] = True
        return gates

    def to_noise(self, output: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The model's prediction as noise (the identities of arXiv 2202.00512, App. D).

        Args:
            output: of the U-Net, [batch, channels, height, width].
            latents: its input.
            timesteps: of the model's training, [batch].
        """
        alpha_cumprod = self._alphas_cumprod[timesteps.cpu()].double().view(-1, 1, 1, 1)
        signal, noise = (part.float().to(output.device) for part in (alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5))
        if self._prediction_type == "v_prediction":
            return signal * output + noise * latents
        if self._prediction_type == "sample":
            return (latents - signal * output) / noise
        return output
