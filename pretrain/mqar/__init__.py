"""Multi-query associative recall (MQAR): which mixer remembers how many pairs, at which width.

The task and the grid are those of Arora et al. (arXiv 2312.04927, figure 2). `task` makes the data, `config`
says what is trained, `train` trains one model, `grid` many of them, `report` compares them.
"""
