"""Replies in OpenAI's forms, whole and in chunks.

`chat` and `completion` each turn the events of answers into a reply or into the chunks of a stream; `usage`
counts, `tokens` and `logprobs` write log-probabilities, `event_stream` sends chunks as server-sent
events, `whole` replies in one piece.
"""
