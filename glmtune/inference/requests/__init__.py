"""What is asked of the engine and what comes back: requests, how their tokens are chosen, and their answers.

``sampling.py`` says how tokens are chosen, ``request.py`` what is asked, ``generation.py`` is the handle of a
request that runs, ``text_stream.py`` turns tokens into text as it becomes final. Conversations come on top:
begin with ``chat.py``; ``answer_events.py`` says what an answer consists of, ``answer_reader.py`` finds the
calls of tools in it, ``tool_choice.py`` says which must be called.
"""
