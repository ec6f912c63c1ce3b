import torch
from losses import redi_loss, sequence_logps, token_logps  # redi/losses.py, copied beside this script


def redi_step(model, optimizer, input_ids, attention_mask, labels, alpha=0.8):
    """One REDI step of a transformers model on a right-padded batch, (2B, L): B chosen rows, then B rejected.
    labels: input_ids where they belong to a response, -100 on prompts and padding."""
    hidden = model.model(input_ids, attention_mask=attention_mask).last_hidden_state[:, :-1].flatten(0, 1)
    labels = labels[:, 1:].flatten()  # what comes after each position
    rows = torch.arange(0, len(labels) + 1, input_ids.shape[1] - 1, device=labels.device)
    logps, lengths = sequence_logps(token_logps(hidden, model.lm_head.weight, labels), labels, rows)
    loss = redi_loss(*logps.chunk(2), *lengths.chunk(2), alpha).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
